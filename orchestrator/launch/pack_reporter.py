"""What stands behind a pack on Ray: orders and events go over the desk, checkpoints into the trials' store."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray
import ray.train

from orchestrator.errors import CheckpointError
from orchestrator.launch.trial_store import TrialStore
from orchestrator.train.desk import Orders

_WAIT_S = 0.05
"""A step waits for the desk as long at most: an answer takes a millisecond or two, and a slot that comes free is filled
before the step, not after it."""


class RayPackReporter:
    """A ``PackReporter`` over the desk's actor. What is told goes out with the next call for orders."""

    def __init__(self, desk: Any, pack: str, store: TrialStore) -> None:
        self._desk, self._pack, self._store = desk, pack, store
        self._held: set[str] = set()
        self._said: list[tuple[str, str, dict[str, Any]]] = []
        self._asked: Any = None
        self._warned = False

    def orders(self, free: int) -> Orders | None:
        """The desk's; while trials train, an answer that is late is for the next step."""
        self.flush()
        busy = bool(self._held)
        if self._asked is None:
            self._asked = self._desk.orders.remote(self._pack, free, busy=busy)
        ready, _ = ray.wait([self._asked], timeout=_WAIT_S if busy else None)
        if not ready:
            return None
        orders: Orders = ray.get(ready[0])
        self._asked = None
        self._held.update(lease.trial for lease in orders.join)
        return orders if orders != Orders() else None

    def tell(self, trial: str, kind: str, values: Mapping[str, Any]) -> None:
        """To the desk, a little later and in order."""
        self._said.append((trial, kind, dict(values)))
        if kind in ("ended", "left"):
            self._held.discard(trial)

    def flush(self) -> None:
        """Send what was told."""
        said, self._said = self._said, []
        if said:
            ray.get(self._desk.tell.remote(self._pack, said))

    def checkpoint(self, trial: str, step: int, write: Callable[[Path], None]) -> None:
        """Into the trial's folder, in place of the last one. A storage that takes none stops the search: no trial is
        to blame, and none could be kept."""
        self.flush()  # a checkpoint is behind what was told: nobody would tell it again
        try:
            self._store.save(trial, step, write)
        except CheckpointError as e:
            ray.get(self._desk.fail.remote(type(e).__name__, str(e)))
            raise

    def restored(self, trial: str) -> AbstractContextManager[Path | None]:
        """The trial's checkpoint."""
        return self._store.latest(trial)

    def shrink(self, capacity: int, tokens: int) -> None:
        """Remembered by the desk, so that a restart knows."""
        ray.get(self._desk.shrink.remote(self._pack, capacity, tokens))

    def preempted(self) -> bool:
        """Ray's notice that a node will go."""
        told = ray.train.get_preemption_info() is not None and not self._warned
        self._warned |= told
        return told
