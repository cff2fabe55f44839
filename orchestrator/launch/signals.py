"""SIGTERM and SIGINT at a driver."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def on_signal(stop: Callable[[str], Any]) -> Iterator[None]:
    """Inside, the first signal calls ``stop`` with the reason, a second one ends at once (``KeyboardInterrupt``).

    Only a process's main thread may handle signals; in another nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def hear(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        stop(f"stopped by {signal.Signals(number).name}")

    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, hear))
        yield
