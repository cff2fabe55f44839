"""Which token belongs to which slot, and how to see the tokens slot by slot without a loop.

Shapes: B rows, T tokens, N = B T tokens, G slots with tokens, M tokens of the largest of them, F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.errors import MethodError


@dataclass(frozen=True)
class Group:
    """The tokens of some slots, one slot after another."""

    slots: tuple[int, ...]
    """The slots that have tokens, in the order asked for."""
    index_K: Tensor | None
    """K = G M token numbers; None where the tokens already lie so."""
    back_N: Tensor | None
    """For each token its place in K; None where they already lie so."""
    owned_N1: Tensor | None
    """Which tokens belong to any of the slots; None for all."""
    count: int
    """N."""
    token_R: Tensor | None = None
    """Numbers of the R tokens of these slots, slot by slot; None where they already lie so."""
    real_R: Tensor | None = None
    """Their places among the K; None where no group was filled up."""

    @property
    def alone(self) -> bool:
        """Whether all tokens are one slot's."""
        return len(self.slots) == 1 and self.index_K is None and self.owned_N1 is None

    def pick(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [G, M, F]. A short group is filled up with tokens of its own slot."""
        x_NF = x.reshape(self.count, -1)
        if self.index_K is not None:
            x_NF = x_NF.index_select(0, self.index_K)
        return x_NF.view(len(self.slots), -1, x_NF.shape[-1])

    def put(self, y_GMF: Tensor, like: Tensor) -> Tensor:
        """[G, M, F] to the shape of ``like``; zero for the tokens of no slot here."""
        y_NF = y_GMF.reshape(-1, y_GMF.shape[-1])
        if self.back_N is not None:
            y_NF = y_NF.index_select(0, self.back_N)
        if self.owned_N1 is not None:
            y_NF = torch.where(self.owned_N1, y_NF, 0)  # not a product: 0 * NaN is NaN
        return y_NF.reshape(like.shape)

    def add(self, added_GMF: Tensor, y: Tensor, own: bool) -> Tensor:
        """``y`` [B, T, ...] with ``added`` at its tokens; ``own`` says that y may be written to.

        Costs these tokens alone, so that many methods in one batch cost no more than one.
        """
        added_KF = added_GMF.reshape(-1, added_GMF.shape[-1])
        if self.token_R is None:
            return y + added_KF.reshape(y.shape)
        if self.real_R is not None:
            added_KF = added_KF.index_select(0, self.real_R)
        y_NF = y.reshape(self.count, -1)
        put = y_NF.index_add_ if own else y_NF.index_add
        return put(0, self.token_R, added_KF.to(y.dtype)).reshape(y.shape)


@dataclass
class Route:
    """One forward pass's tokens."""

    slot_BT: Tensor
    """Slot of each token; slots may be any integers, -1 is the bare base."""
    position_BT: Tensor | None = None
    """Position in the sequence."""
    sample_BT: Tensor | None = None
    """Sample number."""
    steps: Mapping[int, int] = field(default_factory=dict)
    """Each slot's step count, for dropout."""
    training: bool = False
    """Whether dropout is on."""
    prefixed: bool = True
    """Whether prefixes of keys and values are added; not where a cache holds them."""
    device: torch.device | str = "cpu"
    """Where the activations are."""
    _groups: dict[tuple[int, ...], Group | None] = field(default_factory=dict)
    _rows: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _tokens: dict[int, Tensor] = field(default_factory=dict)
    _shared: "Route | None" = None

    def __post_init__(self) -> None:
        slots_N = self.slot_BT.reshape(-1).cpu()
        self._tokens = {s: (slots_N == s).nonzero().squeeze(1) for s in torch.unique(slots_N).tolist()}
        self._count = slots_N.numel()

    def group(self, slots: Sequence[int]) -> Group | None:
        """The tokens of ``slots``; None where they have none."""
        key = tuple(slots)
        if key not in self._groups:
            self._groups[key] = self._make(key)
        return self._groups[key]

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` [..., F] are the features of this pass's tokens."""
        return x.shape[:-1] in (self.slot_BT.shape, (self._count,))

    def for_shared(self, shape: Sequence[int]) -> "Route":
        """For an input that all rows share, such as embeddings of relative positions: it is their one slot's.

        Raises:
            MethodError: the rows are of several slots.
        """
        if len(self._tokens) > 1:
            raise MethodError(
                "this base projects relative positions that all rows share: a pass with deltas on these layers is of "
                f"one slot, not of {', '.join(map(str, sorted(self._tokens)))}"
            )
        if self._shared is None or self._shared.slot_BT.shape != tuple(shape):
            slot = next(iter(self._tokens), -1)
            self._shared = Route(torch.full(tuple(shape), slot), device=self.device)
        return self._shared

    def rows(self, slots: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """For each row [B] the place of its slot among ``slots``, and whether it is there. A row is of one slot."""
        if slots not in self._rows:
            place = {slot: i for i, slot in enumerate(slots)}
            of_row = [place.get(s) for s in self.slot_BT[:, 0].tolist()]
            index_B = torch.tensor([i or 0 for i in of_row], device=self.device)
            self._rows[slots] = index_B, torch.tensor([i is not None for i in of_row], device=self.device)
        return self._rows[slots]

    def _make(self, slots: tuple[int, ...]) -> Group | None:
        active = tuple(s for s in slots if s in self._tokens)
        if not active:
            return None
        if len(self._tokens) == 1:
            return Group(active, None, None, None, self._count)
        most = max(len(self._tokens[s]) for s in active)
        index_GM = torch.empty(len(active), most, dtype=torch.long)
        back_N = torch.zeros(self._count, dtype=torch.long)
        owned_N = torch.zeros(self._count, dtype=torch.bool)
        for row, slot in enumerate(active):
            tokens = self._tokens[slot]
            index_GM[row] = tokens[-1]
            index_GM[row, : len(tokens)] = tokens
            back_N[tokens] = row * most + torch.arange(len(tokens))
            owned_N[tokens] = True
        index_K = index_GM.reshape(-1)
        counts = [len(self._tokens[s]) for s in active]
        token_R = torch.cat([self._tokens[s] for s in active])
        real_R = torch.cat([row * most + torch.arange(count) for row, count in enumerate(counts)])
        in_order = index_K.numel() == self._count and bool((index_K == torch.arange(self._count)).all())
        return Group(
            slots=active,
            index_K=None if in_order else index_K.to(self.device),
            back_N=None if in_order else back_N.to(self.device),
            owned_N1=None if owned_N.all() else owned_N.unsqueeze(1).to(self.device),
            count=self._count,
            token_R=None if in_order else token_R.to(self.device),
            real_R=None if min(counts) == most else real_R.to(self.device),
        )
