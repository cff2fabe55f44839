"""What a worker tells, and what it is told. Ray stands behind it in a run, a folder in a test."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol


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
