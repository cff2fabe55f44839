"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) of every slot of a bank at once, on the stacked tensors.

Each slot has its own learning rate, schedule, betas, epsilon, decay, clip norm, step count and non-finite decision:
what ``Trial`` does with one slot, this does with all of them. The number of kernels does not depend on the number of
slots, and a step waits for the device once.

Shapes: S slots of a leaf, K coefficients.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.config import Train
from orchestrator.errors import CheckpointError
from orchestrator.methods import Bank
from orchestrator.methods.stack import Shape, window
from orchestrator.train.schedule import lr_at
from orchestrator.train.trial import MOMENTS, PATIENCE, diverged

_NO_STEP = (1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0)
"""Coefficients under which nothing of a slot moves."""


@dataclass
class Course:
    """Where one slot is in its training."""

    train: Train
    total: int
    step: int = 0
    bad_steps: int = 0
    bad_in_row: int = 0

    @property
    def steps_left(self) -> int:
        """Steps still to do."""
        return self.total - self.step

    @property
    def trouble(self) -> str | None:
        """Why there is no point in going on."""
        return diverged(self.step) if self.bad_in_row >= PATIENCE else None

    def values(self) -> dict[str, int]:
        """What resumes it, as ``Trial.state``'s plain values."""
        return {"step": self.step, "bad_steps": self.bad_steps, "bad_in_row": self.bad_in_row, "total": self.total}


@dataclass
class _Leaf:
    """A stacked tensor, whose slots they are, and its moments."""

    owner: Any
    """What stays itself while its slots come and go."""
    value: Tensor
    """What the bank holds: [S, ...]; of a tensor in no stack, itself without S."""
    order: tuple[int, ...]
    shapes: dict[int, Shape]
    """The trained part of each slot that has one."""
    ratio_S: Tensor
    outside: Tensor | None
    """Which entries are no slot's to train; None where all are."""
    moments: tuple[Tensor, Tensor]
    """[S, ...], fp32."""

    @property
    def stacked(self) -> Tensor:
        """[S, ...]"""
        return self.value.detach().view(self.moments[0].shape)

    def part(self, stacked: Tensor, slot: int) -> Tensor:
        """A slot's trained part of a tensor like this one, in place."""
        return window(stacked, self.order.index(slot), self.shapes[slot])


def _gradient(leaf: _Leaf) -> Tensor:
    """[S, ...]"""
    if leaf.value.grad is None:
        leaf.value.grad = torch.zeros_like(leaf.value)
    return leaf.value.grad.detach().view(leaf.moments[0].shape)


class PackedAdamW:
    """See the module. Every rank holds all of it, and makes the same steps.

    Args:
        bank: slots come and go; the moments follow them.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.courses: dict[int, Course] = {}
        self._leaves: list[_Leaf] = []
        self._slot_R = torch.empty(0, dtype=torch.long)
        """Whose each row of each leaf is."""
        self._version = -1

    def join(self, slot: int, train: Train, total: int) -> None:
        """A slot that is in the bank is trained from now on; its moments are zeros."""
        self._follow()
        self.courses[slot] = Course(train, total)

    def leave(self, slot: int) -> None:
        """It no longer is: to be called before the bank lets it go, so that its number can be given anew."""
        self._follow()
        del self.courses[slot]
        for leaf in self._leaves:
            leaf.shapes.pop(slot, None)

    @torch.no_grad()
    def step(self) -> dict[int, dict[str, float]]:
        """Clip and step with the gradients in the leaves, which are used up.

        Of a slot whose gradient is not finite nothing moves; it is counted (``Course``).

        Returns:
            Each slot's gradient norm and learning rate.
        """
        self._follow()
        slots = list(self.courses)
        if not slots:
            return {}
        grads = [_gradient(leaf) for leaf in self._leaves]
        place = torch.full((max(*slots, int(self._slot_R.max())) + 1,), len(slots))
        place[slots] = torch.arange(len(slots))
        row_R = place[self._slot_R]
        norms = self._norms(grads, row_R, len(slots))
        planned = [self._plan(slot, norm) for slot, norm in zip(slots, norms, strict=True)]
        self._move(grads, row_R, slots, [coefficients for coefficients, _ in planned])
        for slot, norm in zip(slots, norms, strict=True):
            course = self.courses[slot]
            if course.steps_left and math.isfinite(norm):  # what the last step chose anew, no step would train
                self._rechoose(slot)
        return {slot: told for slot, (_, told) in zip(slots, planned, strict=True)}

    def state(self, slot: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What resumes a slot, here or in a ``Trial``: plain values, and full logical tensors on the CPU."""
        tensors = {f"{name}.{moment}": value.cpu().clone() for name, moment, value in self._moments(slot)}
        return self.courses[slot].values(), tensors

    @torch.no_grad()
    def load_state(self, slot: int, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from ``state``.

        Raises:
            CheckpointError: the tensors are not this slot's.
        """
        mine = {f"{name}.{moment}": value for name, moment, value in self._moments(slot)}
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in tensors.items()}:
            raise CheckpointError("the checkpoint's optimizer state is of another method, rank or base; start afresh")
        course = self.courses[slot]
        course.step, course.bad_steps, course.bad_in_row = (values[k] for k in ("step", "bad_steps", "bad_in_row"))
        for name, value in mine.items():
            value.copy_(tensors[name])

    # -- one step -----------------------------------------------------------------------------------------------------

    def _norms(self, grads: Sequence[Tensor], row_R: Tensor, count: int) -> list[float]:
        """Of each slot's gradient. The one place that waits for the device."""
        for leaf, grad in zip(self._leaves, grads, strict=True):
            if leaf.outside is not None:
                grad.masked_fill_(leaf.outside, 0)
        parts = [torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1) for grad in grads]
        # Summed here: a device adds in an order of its own, and ranks that differ in a bit would drift apart.
        square_S = torch.zeros(count + 1, dtype=torch.float64)
        square_S.index_add_(0, row_R, torch.cat(parts).cpu().double().square())
        return [math.sqrt(v) if v >= 0 else math.nan for v in square_S.tolist()[:-1]]

    def _plan(self, slot: int, norm: float) -> tuple[tuple[float, ...], dict[str, float]]:
        """A slot's coefficients, and what is told; counts the step."""
        course, train = self.courses[slot], self.courses[slot].train
        lr = lr_at(train, course.step, course.total)
        course.step += 1
        if not math.isfinite(norm):
            course.bad_steps += 1
            course.bad_in_row += 1
            return _NO_STEP, {"grad_norm": norm, "lr": 0.0}
        course.bad_in_row = 0
        taken = course.step - course.bad_steps
        clip = train.clip / norm if train.clip and norm > train.clip else 1.0
        bias1, bias2 = 1 - train.beta1**taken, 1 - train.beta2**taken
        told = {"grad_norm": norm, "lr": lr}
        w1, w2 = 1 - train.beta1, 1 - train.beta2
        return (clip, w1, train.beta2, w2, math.sqrt(bias2), train.eps, bias1, lr), told

    def _move(
        self, grads: Sequence[Tensor], row_R: Tensor, slots: Sequence[int], planned: Sequence[tuple[float, ...]]
    ) -> None:
        """``p -= lr r (m / bias1 / (sqrt(v) / sqrt(bias2) + eps) + decay p)``, r the tensor's own ratio."""
        bad = [slot for slot, k in zip(slots, planned, strict=True) if k is _NO_STEP]
        decays = [self.courses[slot].train.weight_decay for slot in slots]
        table = torch.tensor([(*k, d) for k, d in zip([*planned, _NO_STEP], [*decays, 0.0], strict=True)])
        table_RK = table[row_R].to(self.bank.device)
        clips, at = any(k[0] != 1.0 for k in planned), 0
        for leaf, grad in zip(self._leaves, grads, strict=True):
            shape, at = (-1, *[1] * (grad.dim() - 1)), at + len(grad)
            k_S = [k.view(shape) for k in table_RK[at - len(grad) : at].unbind(1)]
            clip, w1, beta2, w2, root2, eps, bias1, lr, decay = k_S
            for slot in bad:
                if slot in leaf.order:
                    grad[leaf.order.index(slot)].zero_()  # 0 * NaN is NaN
            if clips:
                grad.mul_(clip)
            lr = lr * leaf.ratio_S.view(shape)
            m, v = leaf.moments
            m.lerp_(grad, w1)
            v.mul_(beta2).add_(grad.square_().mul_(w2))
            below = v.sqrt().div_(root2).add_(eps)
            if any(decays):
                leaf.stacked.mul_(1 - lr * decay)
            leaf.stacked.sub_(torch.div(m, below, out=below).mul_(lr / bias1))

    def _rechoose(self, slot: int) -> None:
        """A method may choose its weights anew; the moments forget what they knew of those that went."""
        if not self.bank.rechooses(slot):
            return
        kept = self.bank.rechoose(slot, self.courses[slot].step)
        for name, _, value in self._moments(slot) if kept else ():
            if name in kept:
                value.mul_(kept[name].to(value.device))

    # -- following the bank -------------------------------------------------------------------------------------------

    def _moments(self, slot: int) -> Iterator[tuple[str, str, Tensor]]:
        """Name of the trained tensor, name and value (in place) of each of its moments."""
        self._follow()
        by_leaf = {id(leaf.value): leaf for leaf in self._leaves}
        for name, value in self.bank.leaves_of(slot).items():
            leaf = by_leaf[id(value)]
            for moment, stacked in zip(MOMENTS, leaf.moments, strict=True):
                part = leaf.part(stacked, slot)
                yield name, moment, part if value.dim() == stacked.dim() else part.view_as(value)

    def _follow(self) -> None:
        """Slots have come, gone or changed size: move each one's moments to where it is now; new ones get zeros."""
        if self._version == self.bank.version:
            return
        before = {id(leaf.owner): leaf for leaf in self._leaves}
        self._leaves = []
        for stack, ratios in self.bank.stacks():
            assert stack.leaf is not None
            shapes = {slot: tuple(view.shape) for slot, view in stack.views.items()}
            self._leaves.append(_leaf(stack, stack.leaf, stack.leaf.shape, tuple(stack.order), shapes, ratios))
        for slot in self.bank.slots:
            for parameter in self.bank.unstacked(slot).values():
                shape = (1, *parameter.shape)
                shapes = {slot: tuple(parameter.shape)}
                self._leaves.append(_leaf(parameter, parameter, shape, (slot,), shapes, {slot: 1.0}))
        for leaf in self._leaves:
            if old := before.get(id(leaf.owner)):
                _carry(old, leaf)
        self._slot_R = torch.tensor([slot for leaf in self._leaves for slot in leaf.order], dtype=torch.long)
        self._version = self.bank.version


def _leaf(
    owner: Any,
    value: Tensor,
    shape: Sequence[int],
    order: tuple[int, ...],
    shapes: dict[int, Shape],
    ratios: Mapping[int, float],
) -> _Leaf:
    whole = all(slot in shapes and (1, *shapes[slot]) == (1, *shape[1:]) for slot in order)
    outside = None
    if not whole:
        outside = torch.ones(shape, dtype=torch.bool, device=value.device)
        for slot, part in shapes.items():
            window(outside, order.index(slot), part).fill_(False)
    ratio_S = torch.tensor([ratios[slot] for slot in order], device=value.device)
    moments = (torch.zeros(shape, device=value.device), torch.zeros(shape, device=value.device))
    return _Leaf(owner, value, order, shapes, ratio_S, outside, moments)


def _carry(old: _Leaf, new: _Leaf) -> None:
    """The moments of the slots that both have; of one that has another size, what both sizes hold."""
    for slot, shape in new.shapes.items():
        if slot in old.shapes:
            both = tuple(min(a, b) for a, b in zip(shape, old.shapes[slot], strict=True))
            for source, target in zip(old.moments, new.moments, strict=True):
                window(target, new.order.index(slot), both).copy_(window(source, old.order.index(slot), both))
