"""What Ray Train calls on each rank."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train

from orchestrator.config import Run
from orchestrator.errors import CheckpointError, DeltaError, MantaError
from orchestrator.launch.storage import as_checkpoint

_MARGIN = 2**20
"""Bytes to leave free beside a checkpoint: Ray keeps its list of checkpoints there."""


class RayReporter:
    """A ``Reporter`` over Ray Train and the mailbox."""

    def __init__(self, mailbox: Any, rescued: str | None = None) -> None:
        self._mailbox = mailbox
        self._rank = ray.train.get_context().get_world_rank()
        self._asked: Any = None
        self._told = False
        self._kept = ray.train.get_checkpoint() or as_checkpoint(rescued)
        self._saved = self._kept is not None

    def event(self, kind: str, values: dict[str, Any]) -> None:
        """To the driver, from the first rank."""
        if self._rank == 0:
            said = self._mailbox.put.remote(kind, values)
            if kind == "done":
                ray.get(said)  # the last word must not be lost with the worker

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """Into the run's storage."""
        name = f"step-{step:08d}"
        if self._rank != 0:
            ray.train.report({}, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory(prefix="manta-checkpoint-") as folder:
            try:
                write(Path(folder))
                self._require_room(Path(folder))
                kept = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"step": step}, checkpoint=kept, checkpoint_dir_name=name)
            except (OSError, DeltaError) as e:
                self._discard(name)
                before = "the one before it is whole" if self._saved else "there is none before it"
                raise CheckpointError(
                    f"the checkpoint of step {step} cannot be written: {e}; {before}. Make room, then go on with: "
                    f"manta train --resume {ray.train.get_context().get_experiment_name()}"
                ) from e
        self._saved = True

    def _require_room(self, folder: Path) -> None:
        """Refuse before anything is written: a disk that fills up half-way would ruin Ray's list of checkpoints too."""
        storage = ray.train.get_context().get_storage()
        if storage.storage_filesystem.type_name != "local":
            return
        need = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) + _MARGIN
        free = shutil.disk_usage(storage.storage_fs_path).free
        if free < need:
            shown = f"{need / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free"
            raise OSError(f"no space left in {storage.storage_fs_path} ({shown})")

    def _discard(self, name: str) -> None:
        """Leave nothing half-written behind."""
        storage = ray.train.get_context().get_storage()
        with suppress(OSError):
            storage.storage_filesystem.delete_dir(storage.build_checkpoint_path_from_name(name))

    @contextmanager
    def restored(self) -> Iterator[Path | None]:
        """The latest checkpoint of this run, on any world size."""
        if self._kept is None:
            yield None
            return
        with self._kept.as_directory() as folder:
            yield Path(folder)

    def stop_reason(self) -> str | None:
        """What the driver said; asked for without waiting."""
        if self._rank != 0:
            return None
        if self._asked is None:
            self._asked = self._mailbox.stop_reason.remote()
        ready, _ = ray.wait([self._asked], timeout=0)
        if not ready:
            return None
        reason: str | None = ray.get(ready[0])
        self._asked = None
        return reason

    def preempted(self) -> bool:
        """Ray's notice that a node will go."""
        told = ray.train.get_preemption_info() is not None and not self._told
        self._told |= told
        return told


def train_worker(config: dict[str, Any]) -> None:
    """One rank. An error of the user's making goes to the mailbox, so that a restart does not repeat it."""
    mailbox = config["mailbox"]
    if ray.get(mailbox.fatal.remote()) is not None:
        return
    try:
        _work(config, mailbox)
    except MantaError as e:
        ray.get(mailbox.fail.remote(type(e).__name__, str(e)))
        raise


def _work(config: dict[str, Any], mailbox: Any) -> None:
    from orchestrator.launch.place import place_of  # torch, late
    from orchestrator.train.worker import work

    place = place_of(config["threads"])
    reporter = RayReporter(mailbox, config["rescued"])
    reporter.event("started", {"ranks": place.ranks, "device": str(place.device), "at": time.time()})
    with tempfile.TemporaryDirectory(prefix="manta-start-") as folder:
        for name, content in (config["start"] or {}).items():
            Path(folder, name).write_bytes(content)
        start = Path(folder) if config["start"] else None
        work(Run.model_validate(config["run"]), place, reporter, start=start)
