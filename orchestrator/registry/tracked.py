"""A run in progress: metrics go through a buffer and a thread, so that training never waits for the server."""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param

from orchestrator.errors import RegistryError
from orchestrator.registry.door import Door, Refused
from orchestrator.registry.limits import METRICS_PER_CALL, clean_key, flat_params

_log = logging.getLogger(__name__)

_MOST_BUFFERED = 200_000
_EVERY_S = 1.0
_LONGEST_PAUSE_S = 30.0


class TrackedRun:
    """One MLflow run.

    Attributes:
        id: MLflow's run id.
        url: Where to look at it; without credentials.
    """

    def __init__(self, door: Door, run_id: str, url: str, *, system_step: int | None = None):
        self.id = run_id
        self.url = url
        self._door = door
        self._buffer: deque[Metric] = deque()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._lost = 0
        self._reason = ""
        self._away = False
        self._threads = [threading.Thread(target=self._write, name=f"metrics-{run_id}", daemon=True)]
        if system_step is not None:
            sample = threading.Thread(target=self._sample, args=(system_step,), name=f"system-{run_id}", daemon=True)
            self._threads.append(sample)
        for thread in self._threads:
            thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take values of one step. Returns at once and never raises; a value that is no number counts as lost."""
        now = int(time.time() * 1000)
        with self._lock:
            for key, value in metrics.items():
                try:
                    self._buffer.append(Metric(clean_key(key), float(value), now, int(step)))
                except (TypeError, ValueError):
                    self._lost += 1
                    self._reason = f"{key} = {value!r} is not a number"
            self._trim()

    def settle(self, params: Mapping[str, Any]) -> None:
        """Write parameters that were not known at the start. Never raises: they are not worth a run."""
        items = [Param(key, value) for key, value in flat_params(params).items()]
        try:
            with self._door.reach(f"write parameters of run {self.id}", retries=1, timeout_s=5):
                self._door.client.log_batch(self.id, params=items, synchronous=True)
        except RegistryError as error:
            _log.warning("%s", error)

    def attach(self, path: Path) -> None:
        """Keep a file beside the run. Never raises: it is not worth a run."""
        try:
            with self._door.reach(f"attach {path.name} to run {self.id}", retries=1, timeout_s=30):
                self._door.client.log_artifact(self.id, str(path))
        except RegistryError as error:
            _log.warning("%s", error)

    def _trim(self) -> None:
        over = len(self._buffer) - _MOST_BUFFERED
        for _ in range(over):
            self._buffer.popleft()
        if over > 0:
            self._lost += over
            self._reason = self._reason or "the server was away for too long"

    def flush(self) -> bool:
        """Write what is buffered. False where the server is away; then all of it stays buffered."""
        with self._writing:
            while True:
                with self._lock:
                    batch = [self._buffer.popleft() for _ in range(min(METRICS_PER_CALL, len(self._buffer)))]
                if not batch:
                    return True
                try:
                    with self._door.reach(f"log metrics of run {self.id}", retries=0, timeout_s=5):
                        self._door.client.log_batch(self.id, metrics=batch, synchronous=True)
                except Refused as error:
                    with self._lock:
                        self._lost += len(batch)
                        self._reason = str(error)
                    _log.warning("%d metric values are lost: %s", len(batch), error)
                except RegistryError as error:
                    with self._lock:
                        self._buffer.extendleft(reversed(batch))
                        self._reason = str(error)
                        self._trim()
                    if not self._away:
                        _log.warning("metrics are kept in memory until the server is back: %s", error)
                    self._away = True
                    return False
                else:
                    if self._away:
                        _log.warning("MLflow at %s is back; buffered metrics are written", self._door.address.shown)
                    self._away = False

    def _write(self) -> None:
        pause = _EVERY_S
        while not self._closing.wait(pause):
            pause = _EVERY_S if self.flush() else min(2 * pause, _LONGEST_PAUSE_S)

    def _sample(self, step: int) -> None:
        # MLflow's own sampler ends for good at the first failed request; its monitors are used, its thread is not.
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        every = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or 10)
        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no GPU, or no library that reads it
            monitors.append(GPUMonitor())
        while True:
            values: dict[str, float] = {}
            for monitor in monitors:
                try:
                    monitor.collect_metrics()
                    values.update(monitor.aggregate_metrics())
                    monitor.clear_metrics()
                except Exception as error:  # a counter that this machine lacks must not end a run
                    _log.debug("no system metrics from %s: %s", type(monitor).__name__, error)
            self.log({f"system/{key}": value for key, value in values.items()}, step)
            step += 1
            if self._closing.wait(every):
                return

    def finish(self, status: str = "FINISHED", *, patience_s: float = 15.0) -> None:
        """Write what is left and end the run as ``FINISHED``, ``FAILED`` or ``KILLED``.

        Raises:
            RegistryError: something could not be written within ``patience_s``; says how much and why.
        """
        self._closing.set()
        for thread in self._threads:
            thread.join(patience_s)
        deadline = time.monotonic() + patience_s
        written = self.flush()
        while not written and time.monotonic() < deadline:
            time.sleep(min(_EVERY_S, max(0.0, deadline - time.monotonic())))
            written = self.flush()
        missing = []
        with self._lock:
            if unwritten := self._lost + len(self._buffer):
                missing.append(f"{unwritten:,} metric values")
        reason = self._reason
        try:
            with self._door.reach(f"end run {self.id}", retries=1, timeout_s=5):
                self._door.client.set_terminated(self.id, status)
        except RegistryError as error:
            missing.append(f"the final status {status}")
            reason = str(error)
        if missing:
            raise RegistryError(f"run {self.id}: {' and '.join(missing)} could not be written: {reason}")
