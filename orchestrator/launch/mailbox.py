"""The mailbox: an actor between the driver and a run's workers."""

from typing import Any

import ray


class Box:
    """Keeps the workers' events for the driver, and the driver's word for the workers."""

    def __init__(self) -> None:
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._stop: str | None = None
        self._fatal: tuple[str, str] | None = None

    def put(self, kind: str, values: dict[str, Any]) -> None:
        """A worker says something."""
        self._events.append((kind, values))

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        """The driver takes all that was said."""
        events, self._events = self._events, []
        return events

    def stop(self, reason: str) -> None:
        """The driver asks for an end."""
        self._stop = reason

    def stop_reason(self) -> str | None:
        """Why to stop."""
        return self._stop

    def fail(self, kind: str, message: str) -> None:
        """A worker met an error that no restart mends; the first one counts."""
        self._fatal = self._fatal or (kind, message)

    def fatal(self) -> tuple[str, str] | None:
        """That error: class name and message."""
        return self._fatal


def open_mailbox() -> Any:
    """A new mailbox on the driver's own node."""
    here = ray.get_runtime_context().get_node_id()
    pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=True)
    return ray.remote(Box).options(num_cpus=0, scheduling_strategy=pinned).remote()
