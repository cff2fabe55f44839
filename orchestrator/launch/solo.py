"""Trials that share their base with none: one after the other, each as a run of its own would train."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.collective import broadcast_from_rank_zero

from orchestrator.config import Run
from orchestrator.errors import CheckpointError, MantaError
from orchestrator.launch.trial_store import TrialStore
from orchestrator.train.desk import Lease, Orders
from orchestrator.train.worker import Place, work

_JOINED = "loaded"
"""The event that says that a trial's first step is near."""


class SoloReporter:
    """A ``Reporter`` of one trial over the desk."""

    def __init__(self, desk: Any, pack: str, trial: str, store: TrialStore, keep: int) -> None:
        self._desk, self._pack, self._trial = desk, pack, trial
        self._store, self._keep = store, keep
        self._rank = ray.train.get_context().get_world_rank()
        self._asked: Any = None
        self._told = False
        self.leaving = False

    def event(self, kind: str, values: dict[str, Any]) -> None:
        """To the desk, from the first rank."""
        if self._rank != 0:
            return
        if kind == _JOINED:
            self.tell("joined", {})
        elif kind == "step":
            self.tell(kind, {**values, "tokens": round(values["tokens_per_s"] * values["seconds_per_step"])})
        elif kind in ("eval", "saved", "warning"):
            self.tell(kind, values)

    def tell(self, kind: str, values: dict[str, Any]) -> None:
        """One event of this trial; its end is waited for."""
        said = self._desk.tell.remote(self._pack, [(self._trial, kind, values)])
        if kind == "ended":
            ray.get(said)

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Into the trial's folder, by the first rank."""
        if self._rank == 0:
            self._store.save(self._trial, step, write, keep=self._keep)

    def restored(self) -> AbstractContextManager[Path | None]:
        """The trial's latest checkpoint."""
        return self._store.latest(self._trial)

    def stop_reason(self) -> str | None:
        """What the desk said; asked for without waiting."""
        if self._rank != 0:
            return None
        if self._asked is None:
            self._asked = self._desk.orders.remote(self._pack, 0, busy=True)
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return None
        orders: Orders = ray.get(ready[0])
        self._asked = None
        self.leaving = self._trial in orders.leave
        return "withdrawn" if self.leaving else None

    def preempted(self) -> bool:
        """Ray's notice that a node will go."""
        told = ray.train.get_preemption_info() is not None and not self._told
        self._told |= told
        return told


def train_solo(desk: Any, pack: str, place: Place, store: TrialStore, keep: int) -> None:
    """Train the trials of this pack's lane until the desk closes it.

    Raises:
        CheckpointError: the storage is full: no trial is to blame.
        MantaError: a trial failed on one of several ranks; the others wait for it and have to start anew.
    """
    while (lease := _next(desk, pack, place)) is not None:
        reporter = SoloReporter(desk, pack, lease.trial, store, keep)
        try:
            why = work(Run.model_validate(lease.run), place, reporter)
        except CheckpointError:
            raise
        except MantaError as e:
            if place.rank == 0:
                reporter.tell("ended", {"why": "failed", "reason": str(e)})
            if place.ranks > 1:
                raise
        else:
            if place.rank == 0:
                reporter.tell("ended", {"why": why})


def _next(desk: Any, pack: str, place: Place) -> Lease | None:
    """The next trial, the same on every rank."""
    trial: str | None = None
    if place.rank == 0:
        while True:
            orders: Orders = ray.get(desk.orders.remote(pack, 1, busy=False))
            if orders.join or orders.close:
                trial = orders.join[0].trial if orders.join else None
                break
    trial = broadcast_from_rank_zero(trial)
    lease: Lease | None = ray.get(desk.lease.remote(pack, trial)) if trial else None
    return lease
