"""What goes into the engine and what comes out of it."""

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.batch import NO_SLOT
from orchestrator.errors import ServeError
from orchestrator.serve.sampling import Picked, Sampling


class BusyError(ServeError):
    """As many requests are waiting as may wait; try again shortly."""


@dataclass(frozen=True, slots=True)
class Event:
    """What one step did for one request. The last one has ``finish``."""

    text: str = ""
    """Text to append."""
    picked: Picked | None = None
    """The token behind it; its text may come later."""
    finish: str | None = None
    """``stop`` (end of sequence or stop string), ``length``, ``error``, or ``cancelled``."""
    error: str | None = None
    """What went wrong, with ``finish == "error"``."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    sampling: Sampling
    """How to pick tokens and when to stop."""
    slot: int = NO_SLOT
    """The bank's slot that answers; ``NO_SLOT`` for the bare base."""
    on_done: Callable[[], None] | None = None
    """Called once on the engine's thread when the engine is through with the slot."""


class Ticket:
    """A request that was taken in: iterate over its events (``async for`` where it was submitted in a loop)."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop | None) -> None:
        self.request = request
        self.loop = loop
        self.cancelled = False
        self.generated = 0
        """Tokens picked so far."""
        self._queue: Any = asyncio.Queue() if loop else queue.SimpleQueue()

    def cancel(self) -> None:
        """Stop working on it before the next step. Harmless when it is done."""
        self.cancelled = True

    def put(self, event: Event) -> None:
        """Deliver an event (in the loop's thread, where there is one)."""
        self._queue.put_nowait(event) if self.loop else self._queue.put(event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        event = Event()
        while event.finish is None:
            event = await self._queue.get()
            yield event

    def __iter__(self) -> Iterator[Event]:
        event = Event()
        while event.finish is None:
            event = self._queue.get()
            yield event


@dataclass(slots=True)
class Stats:
    """Counters since the start."""

    requests: int = 0
    rejected: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    running: int = 0
    waiting: int = 0
    step_began: float | None = field(default=None, repr=False)
