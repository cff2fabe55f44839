"""A ``PackReporter`` over a ``Desk`` in this process and a folder: a pack without a cluster."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError, DeltaError
from orchestrator.train.desk import Desk, Orders

_WAIT_S = 0.02


class LocalDesk:
    """See the module.

    Args:
        desk: where trials queue.
        folder: holds each trial's last checkpoint, ``<trial>/step-<step>``.
        pack: the pack's name at the desk.
        lane: whose trials it takes.
    """

    def __init__(self, desk: Desk, folder: Path, *, pack: str = "pack", lane: str = "") -> None:
        self.desk, self.folder, self.name = desk, folder, pack
        desk.hello(pack, lane)

    def orders(self, free: int) -> Orders | None:
        """The desk's."""
        orders = self.desk.orders(self.name, free)
        if orders == Orders():
            time.sleep(0 if free == 0 else _WAIT_S)
            return None
        return orders

    def tell(self, trial: str, kind: str, values: Mapping[str, Any]) -> None:
        """To the desk."""
        self.desk.tell(self.name, [(trial, kind, values)])

    def checkpoint(self, trial: str, step: int, write: Callable[[Path], None]) -> None:
        """Into the folder: written beside it, then moved."""
        home = self.folder / trial
        home.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
        try:
            write(made)
            kept = home / f"step-{step:08d}"
            if kept.exists():
                shutil.rmtree(kept)
            made.rename(kept)
        except (OSError, DeltaError) as e:
            raise CheckpointError(f"the checkpoint of step {step} cannot be written: {e}") from e
        finally:
            shutil.rmtree(made, ignore_errors=True)
        for old in home.glob("step-*"):
            if old != kept:
                shutil.rmtree(old, ignore_errors=True)

    def latest(self, trial: str) -> Path | None:
        """Its last checkpoint."""
        return max((self.folder / trial).glob("step-*"), default=None)

    @contextmanager
    def restored(self, trial: str) -> Iterator[Path | None]:
        """Its last checkpoint."""
        yield self.latest(trial)

    def shrink(self, capacity: int, tokens: int) -> None:
        """To the desk."""
        self.desk.shrink(self.name, capacity, tokens)

    def preempted(self) -> bool:
        """Nobody goes."""
        return False
