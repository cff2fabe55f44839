"""Many trials at once on one frozen base: the bench's own pack.

The losses, the bank and the probe are the package's; what is made anew each step for all trials at once is the batch
(trials of one seed read the same records, so a row is made once and repeated) and AdamW (on the stacked tensors, each
slot with its own rate, clipping and step count).

Shapes: S slots of a leaf, R rows, T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.config import Train
from orchestrator.data import Batch, Sample, collate, pack
from orchestrator.methods import Bank
from orchestrator.train.schedule import lr_at


class PackedAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) of every slot of a bank at once; as ``Trial``, slot by slot.

    Args:
        bank: its slots stay as they are.
        trains: of each slot.
        total: steps of the run.
    """

    def __init__(self, bank: Bank, trains: Mapping[int, Train], total: int) -> None:
        self.bank, self.trains, self.total = bank, dict(trains), total
        self.slots = list(trains)
        self.taken = dict.fromkeys(self.slots, 0)  # steps, and of these finite ones
        self.finite = dict.fromkeys(self.slots, 0)
        place = {slot: n for n, slot in enumerate(self.slots)}
        self.leaves: list[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]] = []
        for stack, ratios in bank.stacks():
            assert stack.leaf is not None
            leaf = stack.leaf.detach()
            index_S = torch.tensor([place[s] for s in stack.order], device=leaf.device)
            ratio_S = torch.tensor([ratios[s] for s in stack.order], device=leaf.device)
            mask = torch.zeros_like(leaf)
            for slot, view in stack.views.items():
                part = mask[stack.order.index(slot)]
                for dim, size in enumerate(view.shape):
                    part = part.narrow(dim, 0, size)
                part.fill_(1.0)
            whole = bool(mask.all())
            zeros = (torch.zeros_like(leaf), torch.zeros_like(leaf))
            self.leaves.append((stack.leaf, index_S, None if whole else mask, ratio_S, *zeros))

    @torch.no_grad()
    def step(self) -> None:
        """Clip and step with the gradients at hand; of a slot whose gradient is not finite nothing moves."""
        device = self.leaves[0][0].device
        square_S = torch.zeros(len(self.slots), device=device, dtype=torch.float64)
        for leaf, index_S, mask, *_ in self.leaves:
            if leaf.grad is None:
                continue
            if mask is not None:
                leaf.grad.mul_(mask)
            square_S.index_add_(0, index_S, leaf.grad.flatten(1).square().sum(1).double())
        table = torch.tensor([self._coefficients(n, q) for n, q in enumerate(square_S.tolist())], device=device)
        for leaf, index_S, _, ratio_S, m, v in self.leaves:
            if leaf.grad is None:
                continue
            shape = (-1, *[1] * (leaf.dim() - 1))
            clip, lr, decay, w1, w2, bias2, eps = (c.view(shape) for c in table[index_S].unbind(1))
            lr = lr * ratio_S.view(shape)
            grad = torch.where(w1 > 0, leaf.grad * clip, 0)
            m.lerp_(grad, w1)
            v.lerp_(grad.square(), w2)
            leaf.data.mul_(1 - lr * decay).sub_(lr * m / (v.sqrt() * bias2 + eps))

    def _coefficients(self, number: int, square: float) -> list[float]:
        slot = self.slots[number]
        train, norm = self.trains[slot], math.sqrt(square) if square >= 0 else math.nan
        lr = lr_at(train, self.taken[slot], self.total)
        self.taken[slot] += 1
        if not math.isfinite(norm):
            return [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
        self.finite[slot] += 1
        t = self.finite[slot]
        clip = min(1.0, train.clip / norm) if train.clip and norm > 0 else 1.0
        bias1, bias2 = 1 - train.beta1**t, 1 - train.beta2**t
        w1, w2 = 1 - train.beta1, 1 - train.beta2
        # lr m / (bias1 (sqrt(v / bias2) + eps)); the decay is of the whole lr, so it is divided out of lr here.
        return [clip, lr / bias1, train.weight_decay * bias1, w1, w2, 1 / math.sqrt(bias2), train.eps]


class Rows:
    """Samples of each slot to the micro-batches of all: slots that read the same samples share the work."""

    def __init__(self, bank: Bank, readers: Mapping[int, Any], *, length: int, pad_id: int, tokens: int) -> None:
        self.bank, self.length, self.pad_id, self.tokens = bank, length, pad_id, tokens
        self.groups: dict[tuple[Any, tuple[int, int]], list[int]] = {}
        for slot, reader in readers.items():
            self.groups.setdefault((reader, bank.lead(slot)), []).append(slot)

    def batches(self, samples: Mapping[Any, Sequence[Sample]]) -> list[Batch]:
        """Micro-batches of at most ``tokens`` tokens, about; samples are named by reader."""
        made = []
        for (reader, lead), slots in self.groups.items():
            rows = pack({0: samples[reader]}, length=self.length, packing=True, leads={0: lead})
            one = collate(rows, pad_id=self.pad_id)
            at_once = max(1, self.tokens // one.tokens_BT.numel())
            for at in range(0, len(slots), at_once):
                made.append(_repeated(one, slots[at : at + at_once]))
        return _merged(made, self.tokens)


def _repeated(one: Batch, slots: Sequence[int]) -> Batch:
    """The rows once for each slot."""
    times, rows = len(slots), one.tokens_BT.shape[0]
    slot_R = torch.tensor(slots).repeat_interleave(rows)
    return Batch(
        tokens_BT=one.tokens_BT.repeat(times, 1),
        labels_BT=one.labels_BT.repeat(times, 1),
        slot_BT=slot_R.unsqueeze(1).expand(-1, one.tokens_BT.shape[1]),
        segment_BT=one.segment_BT.repeat(times, 1),
        position_BT=one.position_BT.repeat(times, 1),
        sample_BT=one.sample_BT.repeat(times, 1),
    )


def _merged(batches: list[Batch], tokens: int) -> list[Batch]:
    """Batches of one width joined, as long as they stay below the bound."""
    joined: list[Batch] = []
    for batch in sorted(batches, key=lambda b: b.tokens_BT.shape[1]):
        last = joined[-1] if joined else None
        fits = last and last.tokens_BT.shape[1] == batch.tokens_BT.shape[1]
        if last and fits and last.tokens_BT.numel() + batch.tokens_BT.numel() <= tokens:
            joined[-1] = Batch(**{n: torch.cat([getattr(last, n), getattr(batch, n)]) for n in last.__slots__})
            continue
        joined.append(batch)
    return joined


def losses(
    model: Any, bank: Bank, loss: Any, batches: Sequence[Batch], targets: Mapping[int, int], step: int | None
) -> dict[int, float]:
    """Each slot's mean loss; with ``step`` its gradient too, in the leaves."""
    slots, device = list(targets), bank.device
    place = torch.full((max(slots) + 1,), -1)
    place[slots] = torch.arange(len(slots))
    place = place.to(device)
    weight_S = torch.tensor([1 / max(1, targets[s]) for s in slots], device=device)
    sum_S = torch.zeros(len(slots), device=device, dtype=torch.float64)
    if step is not None:
        bank.zero_grad()
    for batch in batches:
        steps = None if step is None else dict.fromkeys(slots, step)
        moved = batch.to(device)
        with (
            torch.set_grad_enabled(step is not None),
            bank.routed(batch.slot_BT, position_BT=moved.position_BT, sample_BT=moved.sample_BT, steps=steps),
        ):
            loss_N, slot_N = loss(model, Batch(**{**_fields(moved), "slot_BT": batch.slot_BT}))
            index_N = place[slot_N.to(device)]
            sum_S.index_add_(0, index_N, loss_N.detach().double())
            if step is not None:
                (loss_N * weight_S[index_N]).sum().backward()
    return dict(zip(slots, (sum_S * weight_S.double()).tolist(), strict=True))


def _fields(batch: Batch) -> dict[str, Tensor]:
    return {name: getattr(batch, name) for name in batch.__slots__}
