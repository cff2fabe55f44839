"""What a worker tells, and what it is told. Ray stands behind it in a run, a folder in a test."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from orchestrator.train.desk import Orders


class Reporter(Protocol):
    """Handed into ``work``; every rank has one."""

    def event(self, kind: str, values: dict[str, Any]) -> None:
        """Say something; the first rank's word counts. Kinds: loaded, data, step, eval, saved, done."""

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint. Every rank calls it, equally often; the first rank's ``write`` fills a new folder."""

    def restored(self) -> AbstractContextManager[Path | None]:
        """The checkpoint to go on from, as a local folder, if this is not a fresh start."""

    def stop_reason(self) -> str | None:
        """Why to stop now, if this rank was told to."""

    def preempted(self) -> bool:
        """Whether a node of the run is about to go, said once. Every rank calls it, equally often."""


class PackReporter(Protocol):
    """Handed into ``pack``; every rank has one. Only the first rank's is spoken to, where nothing else is said."""

    def orders(self, free: int) -> Orders | None:
        """What to do before the next step, at most ``free`` trials to take in; None for nothing.

        Must not wait while trials live; where none does (``free`` is all there is) it may, for some seconds.
        """

    def tell(self, trial: str, kind: str, values: Mapping[str, Any]) -> None:
        """What became of a trial (``desk.Event``); of the pack itself where the trial is empty."""

    def checkpoint(self, trial: str, step: int, write: Callable[[Path], None]) -> None:
        """Keep a trial's checkpoint, whole or not at all, in place of its last one; ``write`` fills a new folder.

        Raises:
            CheckpointError: it cannot be kept. The pack goes on, and the last one stays.
        """

    def restored(self, trial: str) -> AbstractContextManager[Path | None]:
        """A trial's checkpoint as a local folder, if it has one. Every rank calls it."""

    def shrink(self, capacity: int, tokens: int) -> None:
        """Out of memory: no more than so many slots, and tokens of a pass, from now on; also after a restart."""

    def preempted(self) -> bool:
        """Whether a node of the pack is about to go, said once. Every rank calls it, equally often."""
