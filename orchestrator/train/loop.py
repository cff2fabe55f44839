"""The training loop of one trial."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from orchestrator.config import Train
from orchestrator.data import Sample, SampleSource
from orchestrator.train.checkpoint import Restored
from orchestrator.train.engine import Engine
from orchestrator.train.reporter import Reporter
from orchestrator.train.standing import Snapshot, Standing
from orchestrator.train.step import Evaluate, Stepper
from orchestrator.train.trial import Trial
from orchestrator.train.writer import DeltaWriter

_LOOK_S = 5.0
"""Seconds between looks for a preempted node; a look is a barrier."""


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
        self.standing = Standing(self.train, self.trial.total)
        self.rhythm = self.standing.rhythm
        self.saved_at = -1
        self.looked_at = time.monotonic()

    def restore(self, restored: Restored) -> None:
        """Go on from a checkpoint; the bank already holds its delta."""
        values = restored.values
        self.trial.load_state(values["trial"], restored.optimizer)
        self.source.load_state(values["cursor"])
        self.standing.restore(restored)
        self.saved_at = self.trial.step

    def run(self) -> str:
        """Train to the end, to early stopping, or until told to stop; returns which."""
        why = "stopped early" if self.standing.enough else "finished"
        while self.trial.steps_left and why == "finished":
            self._step()
            last = not self.trial.steps_left
            if self.held_out and (last or self.trial.step % self.rhythm.eval == 0):
                self._evaluate(self.held_out)
                why = "stopped early" if self.standing.enough else why
            reason = self.reporter.stop_reason()
            word = self.engine.most(2 if reason else int(self._look_due()))
            if word == 2:
                why = reason or "told to stop"
            going = word == 1 and self._preempted()
            if last or going or why != "finished" or self.trial.step % self.rhythm.checkpoint == 0:
                self._save()
        if self.saved_at != self.trial.step:
            self._save()
        self.reporter.event("done", {"why": why, "step": self.trial.step, **self.standing.metrics})
        return why

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
        self.standing.metrics["loss"] = loss = losses()[slot]  # after the update, which waits for the device once
        tokens = sum(len(s.tokens) for s in samples)
        self.standing.tokens += tokens
        if self.trial.step % self.rhythm.log == 0 or not self.trial.steps_left:
            seconds = time.perf_counter() - begin
            self.reporter.event(
                "step",
                {
                    "step": self.trial.step,
                    "total": self.trial.total,
                    "loss": loss,
                    **update,
                    "tokens_per_s": tokens / seconds,
                    "seconds_per_step": seconds,
                    "memory_gib": memory(self.engine.device) / 2**30,
                    "skipped_steps": self.trial.bad_steps,
                },
            )

    def _evaluate(self, held_out: Sequence[Sample]) -> None:
        slot = self.trial.slot
        found = self.evaluate({slot: held_out})[slot]
        self.standing.note(found, self.trial.step, lambda: self.stepper.bank.tensors(slot))
        self.reporter.event("eval", {"step": self.trial.step, **found, "best_step": self.standing.best.step})

    def _save(self) -> None:
        values, optimizer = self.trial.state()  # every rank: shared-out optimizers are collected
        cursor = self.source.state()

        def write(folder: Path) -> None:
            tensors = self.stepper.bank.tensors(self.trial.slot)
            Snapshot(self.writer, self.standing, values, cursor, optimizer, tensors).write(folder)

        self.reporter.checkpoint(self.trial.step, write)
        self.saved_at = self.trial.step
        self.reporter.event("saved", {"step": self.trial.step})


def memory(device: torch.device) -> int:
    """Peak bytes on a GPU, resident bytes of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
