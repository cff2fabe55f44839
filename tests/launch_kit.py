"""What the tests of training share: small runs, a folder in Ray's place, one Ray for a module, a process's command."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from orchestrator.config import Run
from orchestrator.config.load import load_run
from orchestrator.delta import read_tensors
from orchestrator.train.setup import Place
from orchestrator.train.worker import work

ROOT = Path(__file__).parents[1]
SMALL = (
    "data.length=128",
    "train.batch_size=4",
    "train.rows_per_pass=2",
    "train.lr=0.01",
    "cluster.gpus_per_worker=0",
    "tracking.system_metrics=false",
)


def small(*overrides: str) -> Run:
    """A run of few tokens."""
    return load_run(None, [*SMALL, *overrides])


class Folder:
    """A ``Reporter`` that keeps checkpoints in a folder: what Ray is to a run."""

    def __init__(self, folder: Path, *, stop_at: int | None = None) -> None:
        self.folder, self.stop_at = folder, stop_at
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, values: dict[str, Any]) -> None:
        self.events.append((kind, dict(values)))

    def of(self, kind: str, key: str) -> list[Any]:
        return [values[key] for k, values in self.events if k == kind]

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True)
        write(folder)

    @property
    def latest(self) -> Path | None:
        return max(self.folder.glob("step-*"), default=None)

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        yield self.latest

    def stop_reason(self) -> str | None:
        steps = self.of("step", "step")
        return "stopped by the test" if self.stop_at and steps and steps[-1] >= self.stop_at else None

    def preempted(self) -> bool:
        return False


def train_here(run: Run, folder: Path, *, start: Path | None = None, stop_at: int | None = None) -> Folder:
    """Train in this process, alone and without Ray."""
    torch.set_num_threads(1)
    reporter = Folder(folder, stop_at=stop_at)
    place = Place(rank=0, ranks=1, local_ranks=1, device=torch.device("cpu"))
    reporter.why = work(run, place, reporter, start=start)  # type: ignore[attr-defined]
    return reporter


class Heard:
    """A listener that remembers, and acts once at a chosen step."""

    def __init__(self, at: int | None = None, act: Callable[[], None] = lambda: None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._at, self._act = at, act
        self.acted = threading.Event()

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        self.events.append((kind, values))
        if kind == "step" and self._at is not None and values["step"] >= self._at and not self.acted.is_set():
            self.acted.set()
            self._act()

    def of(self, kind: str, key: str) -> list[Any]:
        return [values[key] for k, values in self.events if k == kind]

    @property
    def losses(self) -> dict[int, float]:
        """Loss of each step, as last told."""
        return dict(zip(self.of("step", "step"), self.of("step", "loss"), strict=True))


@contextmanager
def local_ray(cpus: int = 2) -> Iterator[str]:
    """A Ray of this process's own; yields its address."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as temp:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        here = ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100 * 2**20,
            _temp_dir=temp,
        )
        try:
            yield here.address_info["gcs_address"]
        finally:
            ray.shutdown()


def train_workers() -> list[psutil.Process]:
    """Ray Train's worker processes below this process."""
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in "".join(p.cmdline()[:1])]


def command(*words: str, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """``manta`` in a process of its own; its words come on stderr."""
    line = [sys.executable, "-W", "ignore", "-m", "orchestrator.cli", *words]
    return subprocess.Popen(
        line, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: "subprocess.Popen[str]", text: str, timeout_s: float = 120) -> str:
    """Read the process's stderr up to a line with ``text``."""
    assert process.stderr is not None
    read, deadline = "", time.monotonic() + timeout_s
    for line in process.stderr:
        read += line
        if text in line:
            return read
        assert time.monotonic() < deadline, read
    raise AssertionError(f"{text!r} was never said:\n{read}")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A delta's tensors."""
    return read_tensors(folder / "adapter_model.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
