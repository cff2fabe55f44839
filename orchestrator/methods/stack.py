"""Storage of one tensor of one site for all slots that have it: a single leaf, so that one kernel serves all."""

from torch import Tensor, nn


class Stack:
    """Slots' tensors in one leaf [S, ...], padded with zeros to the largest.

    A slot's own tensor is a view of it, kept as one object for life (an optimizer holds on to it), re-pointed when the
    leaf grows.
    """

    def __init__(self) -> None:
        self.leaf: Tensor | None = None
        self.order: list[int] = []
        self.views: dict[int, nn.Parameter] = {}

    def put(self, slot: int, value: Tensor) -> None:
        """Add a slot, or replace it at another size."""
        values = {s: v.data for s, v in self.views.items() if s != slot}
        if slot not in self.order:
            self.order.append(slot)
        self._rebuild({**values, slot: value})

    def drop(self, slot: int) -> None:
        """Remove a slot, if it is here."""
        if slot not in self.order:
            return
        self.order.remove(slot)
        self.views.pop(slot, None)
        self._rebuild({s: v.data for s, v in self.views.items()})

    def _rebuild(self, values: dict[int, Tensor]) -> None:
        if not self.order:
            self.leaf = None
            return
        like = values[self.order[-1]]
        shape = [max(values[s].shape[d] for s in self.order) for d in range(like.dim())]
        leaf = like.new_zeros((len(self.order), *shape))
        for row, slot in enumerate(self.order):
            view = self._window(leaf, row, values[slot].shape)
            view.copy_(values[slot])
            if slot in self.views:
                self.views[slot].data = view
            else:
                self.views[slot] = nn.Parameter(view)
            self.views[slot].grad = None
        self.leaf = leaf.requires_grad_()

    @staticmethod
    def _window(leaf: Tensor, row: int, shape: tuple[int, ...]) -> Tensor:
        window = leaf[row]
        for dim, size in enumerate(shape):
            window = window.narrow(dim, 0, size)
        return window

    def hand_out(self) -> None:
        """Give each slot's tensor its part of the leaf's gradient."""
        if self.leaf is None or self.leaf.grad is None:
            return
        for row, slot in enumerate(self.order):
            self.views[slot].grad = self._window(self.leaf.grad, row, self.views[slot].shape)

    def zero_grad(self) -> None:
        """Forget gradients."""
        if self.leaf is not None:
            self.leaf.grad = None
        for view in self.views.values():
            view.grad = None
