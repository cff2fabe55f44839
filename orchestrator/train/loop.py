"""The training loop of one trial."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestrator.config import Train
from orchestrator.config.train import HIGHER_IS_BETTER
from orchestrator.data import Sample, SampleSource
from orchestrator.train.checkpoint import Best, Restored, write_optimizer, write_state
from orchestrator.train.engine import Engine
from orchestrator.train.reporter import Reporter
from orchestrator.train.step import Evaluate, Stepper
from orchestrator.train.trial import Trial
from orchestrator.train.writer import DeltaWriter

_LOOK_S = 5.0
"""Seconds between looks for a preempted node; a look is a barrier."""


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


@dataclass
class Loop:
    """Everything a trial needs to be trained; ``run`` does it."""

    train: Train
    stepper: Stepper
    trial: Trial
    source: SampleSource
    held_out: Sequence[Sample] | None
    evaluate: Evaluate
    engine: Engine
    reporter: Reporter
    writer: DeltaWriter

    def __post_init__(self) -> None:
        self.best = Best()
        self.metrics: dict[str, float] = {}
        self.rhythm = Rhythm.of(self.train, self.trial.total)
        self.saved_at = -1
        self.looked_at = time.monotonic()

    def restore(self, restored: Restored) -> None:
        """Go on from a checkpoint; the bank already holds its delta."""
        values = restored.values
        self.trial.load_state(values["trial"], restored.optimizer)
        self.source.load_state(values["cursor"])
        self.best = Best(**values["best"], tensors=dict(restored.best.tensors) if restored.best else {})
        self.metrics = dict(values["metrics"])
        self.saved_at = self.trial.step

    def run(self) -> str:
        """Train to the end, to early stopping, or until told to stop; returns which."""
        why = "stopped early" if self._enough() else "finished"
        while self.trial.steps_left and why == "finished":
            self._step()
            last = not self.trial.steps_left
            if self.held_out and (last or self.trial.step % self.rhythm.eval == 0):
                self._evaluate(self.held_out)
                why = "stopped early" if self._enough() else why
            reason = self.reporter.stop_reason()
            word = self.engine.most(2 if reason else int(self._look_due()))
            if word == 2:
                why = reason or "told to stop"
            going = word == 1 and self._preempted()
            if last or going or why != "finished" or self.trial.step % self.rhythm.checkpoint == 0:
                self._save()
        if self.saved_at != self.trial.step:
            self._save()
        self.reporter.event("done", {"why": why, "step": self.trial.step, **self.metrics})
        return why

    def _enough(self) -> bool:
        return bool(self.train.early_stopping) and self.best.since >= (self.train.early_stopping or 0)

    def _look_due(self) -> bool:
        """The first rank's clock decides when all look for a preempted node."""
        return self.engine.rank == 0 and time.monotonic() - self.looked_at > _LOOK_S

    def _preempted(self) -> bool:
        self.looked_at = time.monotonic()
        return self.reporter.preempted()

    def _step(self) -> None:
        begin = time.perf_counter()
        samples = self.source.take(self.train.batch_size)
        slot = self.trial.slot
        losses = self.stepper.start({slot: samples}, {slot: self.trial.step})
        update = self.trial.update()
        self.metrics["loss"] = loss = losses()[slot]  # after the update, which waits for the device once
        if self.trial.step % self.rhythm.log == 0 or not self.trial.steps_left:
            seconds = time.perf_counter() - begin
            tokens = sum(len(s.tokens) for s in samples)
            self.reporter.event(
                "step",
                {
                    "step": self.trial.step,
                    "total": self.trial.total,
                    "loss": loss,
                    **update,
                    "tokens_per_s": tokens / seconds,
                    "seconds_per_step": seconds,
                    "memory_gib": _memory(self.engine.device) / 2**30,
                    "skipped_steps": self.trial.bad_steps,
                },
            )

    def _evaluate(self, held_out: Sequence[Sample]) -> None:
        slot = self.trial.slot
        found = self.evaluate({slot: held_out})[slot]
        self.metrics.update(found)
        watched = self.metrics[self.train.metric]
        if _improves(self.train.metric, watched, self.best.value):
            tensors = self.stepper.bank.tensors(slot)
            self.best = Best(watched, self.trial.step, 0, dict(self.metrics), tensors)
        else:
            self.best.since += 1
        if self.best.value is not None:
            self.metrics[f"best_{self.train.metric}"] = self.best.value
        self.reporter.event("eval", {"step": self.trial.step, **found, "best_step": self.best.step})

    def _save(self) -> None:
        values, optimizer = self.trial.state()  # every rank: shared-out optimizers are collected
        name = self.writer.name

        def write(folder: Path) -> None:
            write_optimizer(folder, name, optimizer)
            self.writer.write(folder / name / "delta", self.stepper.bank.tensors(self.trial.slot), self.metrics)
            if self.best.tensors:
                self.writer.write(folder / name / "best", self.best.tensors, self.best.metrics)
            write_state(folder, {name: self._values(values)})

        self.reporter.checkpoint(self.trial.step, write)
        self.saved_at = self.trial.step
        self.reporter.event("saved", {"step": self.trial.step})

    def _values(self, trial: dict[str, Any]) -> dict[str, Any]:
        best = {key: value for key, value in vars(self.best).items() if key != "tensors"}
        return {"trial": trial, "cursor": self.source.state(), "best": best, "metrics": self.metrics}


def _improves(metric: str, new: float, best: float | None) -> bool:
    """A value that is no number never does."""
    if math.isnan(new) or best is None:
        return not math.isnan(new)
    return new > best if metric in HIGHER_IS_BETTER else new < best


def _memory(device: torch.device) -> int:
    """Peak bytes on a GPU, resident bytes of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
