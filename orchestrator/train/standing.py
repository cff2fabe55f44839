"""What a trial has reached: metrics, the best delta, and what its own config says of evaluation and early stopping."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from orchestrator.config import Train
from orchestrator.config.train import HIGHER_IS_BETTER
from orchestrator.train.checkpoint import Best, Restored, write_optimizer, write_state
from orchestrator.train.writer import DeltaWriter


@dataclass(frozen=True)
class Rhythm:
    """How often what happens, in steps."""

    eval: int
    checkpoint: int
    log: int

    @classmethod
    def of(cls, train: Train, total: int) -> "Rhythm":
        """Ten times in a run, where the config is silent."""
        tenth = max(1, total // 10)
        return cls(train.eval_every or tenth, train.checkpoint_every or tenth, train.log_every)


class Standing:
    """See the module.

    Args:
        train: the trial's own.
        total: its steps.
    """

    def __init__(self, train: Train, total: int) -> None:
        self.train = train
        self.rhythm = Rhythm.of(train, total)
        self.best = Best()
        self.metrics: dict[str, float] = {}
        """Last loss, last metrics, and the best value of the one watched."""
        self.tokens = 0
        """Trained on so far."""

    @property
    def enough(self) -> bool:
        """Whether it is to stop early."""
        return bool(self.train.early_stopping) and self.best.since >= (self.train.early_stopping or 0)

    def note(self, found: Mapping[str, float], step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """An evaluation; ``tensors`` copies the delta, where it is the best."""
        self.metrics.update(found)
        watched = self.metrics[self.train.metric]
        if _improves(self.train.metric, watched, self.best.value):
            self.best = Best(watched, step, 0, dict(self.metrics), tensors())
        else:
            self.best.since += 1
        if self.best.value is not None:
            self.metrics[f"best_{self.train.metric}"] = self.best.value

    def restore(self, restored: Restored) -> None:
        """Go on from a checkpoint."""
        values = restored.values
        self.best = Best(**values["best"], tensors=dict(restored.best.tensors) if restored.best else {})
        self.metrics = dict(values["metrics"])
        self.tokens = values["tokens"]

    def values(self) -> dict[str, Any]:
        """What ``restore`` needs beside the tensors (JSON)."""
        best = {key: value for key, value in vars(self.best).items() if key != "tensors"}
        return {"best": best, "metrics": self.metrics, "tokens": self.tokens}


@dataclass(frozen=True)
class Snapshot:
    """A trial between two steps, ready to be written."""

    writer: DeltaWriter
    standing: Standing
    trial: dict[str, Any]
    """Step counts."""
    cursor: dict[str, Any]
    """Of its data."""
    optimizer: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """The delta."""

    def write(self, folder: Path) -> None:
        """A checkpoint (``checkpoint``)."""
        name, best = self.writer.name, self.standing.best
        write_optimizer(folder, name, self.optimizer)
        self.writer.write(folder / name / "delta", self.tensors, self.standing.metrics)
        if best.tensors:
            self.writer.write(folder / name / "best", best.tensors, best.metrics)
        write_state(folder, {name: {"trial": self.trial, "cursor": self.cursor, **self.standing.values()}})


def _improves(metric: str, new: float, best: float | None) -> bool:
    """A value that is no number never does."""
    if math.isnan(new) or best is None:
        return not math.isnan(new)
    return new > best if metric in HIGHER_IS_BETTER else new < best
