"""Storage of one tensor of one site for all slots that have it: a single leaf, so that one kernel serves all."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class Stack:
    """Slots' tensors in one leaf [S, ...], padded with zeros to the largest.

    The trained part of a slot's tensor is a view of it, kept as one object for life (an optimizer holds on to it),
    re-pointed when the leaf grows.
    """

    def __init__(self) -> None:
        self.leaf: Tensor | None = None
        self.order: list[int] = []
        self.views: dict[int, nn.Parameter] = {}
        """The trained part of each slot that has one."""
        self._shapes: dict[int, Shape] = {}
        self._parts: dict[int, Shape | None] = {}
        self._handed: Tensor | None = None
        """The leaf's gradient whose windows the views have."""

    def put(self, slot: int, value: Tensor, part: Shape | None) -> None:
        """Add a slot, or replace it at another size; the leading ``part`` of the value is trained."""
        values = {s: self.value(s) for s in self.order if s != slot}
        if slot not in self.order:
            self.order.append(slot)
        self._parts[slot] = part
        self._rebuild({**values, slot: value})

    def drop(self, slot: int) -> None:
        """Remove a slot, if it is here."""
        if slot not in self.order:
            return
        values = {s: self.value(s) for s in self.order if s != slot}
        self.order.remove(slot)
        for kept in (self.views, self._shapes, self._parts):
            kept.pop(slot, None)
        self._rebuild(values)

    def value(self, slot: int) -> Tensor:
        """A slot's whole tensor, a view."""
        assert self.leaf is not None
        return window(self.leaf.detach(), self.order.index(slot), self._shapes[slot])

    def _rebuild(self, values: dict[int, Tensor]) -> None:
        self._handed = None
        if not self.order:
            self.leaf = None
            return
        like = values[self.order[-1]]
        shape = [max(values[s].shape[d] for s in self.order) for d in range(like.dim())]
        leaf = like.new_zeros((len(self.order), *shape))
        for row, slot in enumerate(self.order):
            self._shapes[slot] = tuple(values[slot].shape)
            window(leaf, row, self._shapes[slot]).copy_(values[slot])
            part = self._parts[slot]
            if part is None:
                continue
            view = window(leaf, row, part)
            if slot in self.views:
                self.views[slot].data = view
            else:
                self.views[slot] = nn.Parameter(view)
            self.views[slot].grad = None
        self.leaf = leaf.requires_grad_(bool(self.views))

    def hand_out(self) -> None:
        """Give each slot's trained part its part of the leaf's gradient."""
        if self.leaf is None or self.leaf.grad is None:
            return
        if self.leaf.grad is self._handed:  # kept from the last step, and so are its windows
            return
        for slot, view in self.views.items():
            view.grad = window(self.leaf.grad, self.order.index(slot), tuple(view.shape))
        self._handed = self.leaf.grad

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._handed = None
        if self.leaf is not None:
            self.leaf.grad = None
        for view in self.views.values():
            view.grad = None


def window(leaf: Tensor, row: int, shape: Shape) -> Tensor:
    """The leading part of a row, in place."""
    part = leaf[row]
    if part.shape == shape:
        return part
    for dim, size in enumerate(shape):
        part = part.narrow(dim, 0, size)
    return part


def zero_in_place(leaves: Iterable[Tensor]) -> None:
    """Gradients become zeros where they are, and stay there; those that are missing are made."""
    grads = []
    for leaf in leaves:
        if leaf.grad is None:
            leaf.grad = torch.empty_like(leaf)
        grads.append(leaf.grad)
    if grads:
        torch._foreach_zero_(grads)
