"""One step of all trials of a bank over all ranks.

Shapes: N target tokens of a micro-batch, S slots.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.data import Sample, deal, pack
from orchestrator.data.batch import Batch
from orchestrator.methods.bank import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.graph import Graphs

Evaluate = Callable[[Mapping[int, Sequence[Sample]]], dict[int, dict[str, float]]]
"""Each slot's held-out samples to its metrics. Every rank must call it."""
Loss = Callable[[Any, Batch], tuple[Tensor, Tensor]]
"""Model and micro-batch to losses [N] of its targets (tokens, or texts to classify) and the slot [N] of each."""


@dataclass(frozen=True)
class Layout:
    """How samples become micro-batches."""

    length: int
    """Most tokens of a row."""
    rows_per_pass: int
    """Rows of one forward pass of one rank."""
    packing: bool
    """Whether a row may hold several samples."""
    pad_id: int
    """Padding token."""


class Stepper:
    """Packs samples, deals them to ranks, and sums losses and gradients over them.

    With ``graphs``, whose loss is ``causal_lm_loss``, small passes go through them where they can.
    """

    def __init__(
        self, model: Any, bank: Bank, engine: Engine, loss: Loss, layout: Layout, graphs: Graphs | None = None
    ) -> None:
        self.model, self.bank, self.engine, self.loss, self.layout = model, bank, engine, loss, layout
        self.graphs = graphs
        self._seen: tuple[int, tuple[int, ...]] | None = None

    def train(self, samples: Mapping[int, Sequence[Sample]], steps: Mapping[int, int]) -> dict[int, float]:
        """Losses of a forward and backward pass over everyone's samples; each parameter has its gradient after it.

        Args:
            samples: of each slot, the whole global batch, the same on every rank.
            steps: each slot's step count.

        Returns:
            Each slot's loss, a mean over its target tokens on all ranks.
        """
        return self.start(samples, steps)()

    def start(
        self, samples: Mapping[int, Sequence[Sample]], steps: Mapping[int, int]
    ) -> Callable[[], dict[int, float]]:
        """The same, but for the losses: they come when they are asked for, which waits for the device."""
        losses = self.gradients(samples, steps)
        self.bank.hand_out_gradients()
        return losses

    def gradients(
        self, samples: Mapping[int, Sequence[Sample]], steps: Mapping[int, int]
    ) -> Callable[[], dict[int, float]]:
        """The same, with the gradients in the bank's leaves alone."""
        if self._seen != (now := (self.bank.version, tuple(samples))):
            self.engine.forget_order()
            self._seen = now
        self.bank.zero_grad(keep=self.graphs is not None and self.graphs.on)
        sum_S = self._run(samples, steps)
        self.engine.sum_gradients(self.bank.leaves())
        return lambda: _means(samples, sum_S)

    def evaluate(self, samples: Mapping[int, Sequence[Sample]]) -> dict[int, dict[str, float]]:
        """Each slot's ``eval_loss``, a mean over its samples' targets, without dropout or gradients."""
        with torch.no_grad():
            means = _means(samples, self._run(samples, None))
            return {slot: {"eval_loss": loss} for slot, loss in means.items()}

    def _run(self, samples: Mapping[int, Sequence[Sample]], steps: Mapping[int, int] | None) -> Tensor:
        """Sums [S] of the losses of each slot's targets, fp64."""
        slots = list(samples)
        device = self.engine.device
        weight_S = (1 / _counts(samples)).float().to(device)
        place = torch.zeros(max(slots) + 1, dtype=torch.long)
        place[slots] = torch.arange(len(slots))
        place = place.to(device)
        sum_S = torch.zeros(len(slots), dtype=torch.float64, device=device)
        deep = steps is not None and len(slots) > 1
        for batch in self.deal(samples):
            if steps is not None and self.graphs is not None:
                index = slots.index(int(batch.slot_BT[0, 0]))
                total = self.graphs.run(batch, weight_S[index])
                if total is not None:
                    sum_S[index] += total
                    continue
            # Recomputed activations pass the hooks again, so the backward pass stays inside.
            with (
                self.engine.alike(self.model) if deep else nullcontext(),
                self.bank.routed(batch.slot_BT, position_BT=batch.position_BT, sample_BT=batch.sample_BT, steps=steps),
            ):
                losses_N, slot_N = self.loss_of(batch)(self.model, batch.to(device))
                index_N = place[slot_N]
                sum_S.index_add_(0, index_N, losses_N.detach().double())
                if steps is not None:
                    (losses_N * weight_S[index_N]).sum().backward()  # type: ignore[no-untyped-call]
                del losses_N  # recording a graph needs leaves that no earlier pass still hangs on
        return self.engine.sum_(sum_S)

    def loss_of(self, batch: Batch) -> Loss:
        """That of a micro-batch; on the CPU."""
        return self.loss

    def deal(self, samples: Mapping[int, Sequence[Sample]]) -> list[Batch]:
        """This rank's micro-batches of everyone's samples; each rank has as many."""
        leads = {slot: self.bank.lead(slot) for slot in samples}
        rows = pack(samples, length=self.layout.length, packing=self.layout.packing, leads=leads)
        alone = [slot for slot in samples if self.bank.alone(slot)]
        passes = [[row for row in rows if row.slot == slot] for slot in alone]
        passes.append([row for row in rows if row.slot not in alone])
        return [
            batch
            for part in passes
            for batch in deal(
                part,
                rank=self.engine.rank,
                ranks=self.engine.ranks,
                rows_per_pass=self.layout.rows_per_pass,
                pad_id=self.layout.pad_id,
            )
        ]


def _counts(samples: Mapping[int, Sequence[Sample]]) -> Tensor:
    """Targets [S] of each slot."""
    return torch.tensor([max(1, sum(s.targets for s in own)) for own in samples.values()], dtype=torch.float64)


def _means(samples: Mapping[int, Sequence[Sample]], sum_S: Tensor) -> dict[int, float]:
    return dict(zip(samples, (sum_S.cpu() / _counts(samples)).tolist(), strict=True))
