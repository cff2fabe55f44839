"""One step of a pack: each trial's rows are those of its solo run, and passes are filled over all trials."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.data import Row, Sample, deal_by_tokens, pack
from orchestrator.data.batch import Batch
from orchestrator.methods import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.loss import causal_lm_loss, plain_loss
from orchestrator.train.step import Layout, Loss, Stepper


@dataclass(frozen=True)
class Rows:
    """How one trial's samples become rows."""

    length: int
    """Most tokens of a row."""
    packing: bool
    """Whether a row may hold several samples."""


class PackStepper(Stepper):
    """A ``Stepper`` whose slots differ in their rows.

    Args:
        model: what is called.
        bank: around it.
        engine: deals and sums.
        loss: of the slots that leave the base's head alone.
        tokens: of a pass of one rank, at most, padding included; a longer row is a pass of its own.
        pad_id: padding token.
    """

    def __init__(self, model: Any, bank: Bank, engine: Engine, loss: Loss, *, tokens: int, pad_id: int) -> None:
        super().__init__(model, bank, engine, loss, Layout(length=0, rows_per_pass=1, packing=True, pad_id=pad_id))
        self.tokens = tokens
        self.rows: dict[int, Rows] = {}
        """Of each slot."""

    def loss_of(self, batch: Batch) -> Loss:
        """A delta of the head adds to logits, of which there are none where the loss is computed in the head."""
        return plain_loss if self._plain(int(batch.slot_BT[0, 0])) else self.loss

    def _plain(self, slot: int) -> bool:
        return self.loss is causal_lm_loss and self.bank.changes_head(slot)

    def deal(self, samples: Mapping[int, Sequence[Sample]]) -> list[Batch]:
        """This rank's micro-batches of everyone's samples; each rank has as many."""
        kinds: dict[Any, list[Row]] = {}
        for row in self._rows(samples):
            alone = row.slot if self.bank.alone(row.slot) else None
            kinds.setdefault((alone, self._plain(row.slot)), []).append(row)
        return [
            batch
            for rows in kinds.values()
            for batch in deal_by_tokens(
                rows,
                rank=self.engine.rank,
                ranks=self.engine.ranks,
                tokens=self.tokens,
                pad_id=self.layout.pad_id,
            )
        ]

    def _rows(self, samples: Mapping[int, Sequence[Sample]]) -> list[Row]:
        """Each slot's; those that read the same samples share the work."""
        made: dict[Any, list[Row]] = {}
        found: list[Row] = []
        for slot, mine in samples.items():
            lead, how = self.bank.lead(slot), self.rows[slot]
            key = id(mine), lead, how
            if key not in made:
                made[key] = pack({slot: mine}, length=how.length, packing=how.packing, leads={slot: lead})
            found += [replace(row, slot=slot) for row in made[key]]
        return found

    def longest(self) -> int:
        """Most tokens of any slot's row, about: below that, ``tokens`` makes no pass smaller."""
        return max(rows.length + self.bank.lead(slot)[0] for slot, rows in self.rows.items())
