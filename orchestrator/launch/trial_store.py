"""Where packs keep their trials' checkpoints: ``<storage>/<search>/trials/<trial>/step-<n>``, on any file system."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyarrow import fs  # type: ignore[import-untyped]

from orchestrator.errors import CheckpointError, MantaError
from orchestrator.train.checkpoint import STATE


class TrialStore:
    """The checkpoints of one search's trials.

    A checkpoint is whole or not there: on a local disk its folder is renamed into place, elsewhere ``state.json``,
    which makes it one, is written last.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        if "://" in root:
            self._fs, self._path = fs.FileSystem.from_uri(root)
        else:
            self._fs, self._path = fs.LocalFileSystem(), root
        self._local = isinstance(self._fs, fs.LocalFileSystem)

    def save(self, trial: str, step: int, write: Callable[[Path], None]) -> None:
        """Let ``write`` fill a new checkpoint, in place of the last one.

        Raises:
            CheckpointError: it cannot be written; the ones before are whole.
        """
        name = f"step-{step:08d}"
        try:
            self._save_here(trial, name, write) if self._local else self._save_there(trial, name, write)
        except (OSError, MantaError) as e:
            with suppress(OSError):
                self._fs.delete_dir(f"{self._path}/{trial}/{name}.part")
            before = "the one before it is whole" if self.steps(trial) else "there is none before it"
            raise CheckpointError(f"the checkpoint of {trial} at step {step} cannot be written: {e}; {before}") from e
        for old in [s for s in self.steps(trial) if s != step]:
            with suppress(OSError):
                self._fs.delete_dir(f"{self._path}/{trial}/step-{old:08d}")

    def _save_here(self, trial: str, name: str, write: Callable[[Path], None]) -> None:
        final = Path(self._path, trial, name)
        part = final.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)

    def _save_there(self, trial: str, name: str, write: Callable[[Path], None]) -> None:
        there = f"{self._path}/{trial}/{name}"
        with tempfile.TemporaryDirectory(prefix="manta-checkpoint-") as folder:
            write(Path(folder))
            state = Path(folder, STATE)
            kept = state.read_bytes()
            state.unlink()
            fs.copy_files(folder, there, source_filesystem=fs.LocalFileSystem(), destination_filesystem=self._fs)
            with self._fs.open_output_stream(f"{there}/{STATE}") as file:
                file.write(kept)

    def steps(self, trial: str) -> list[int]:
        """Steps of a trial's whole checkpoints, ascending."""
        found = self._fs.get_file_info(fs.FileSelector(f"{self._path}/{trial}", allow_not_found=True))
        names = [i.base_name for i in found if i.base_name.startswith("step-") and i.base_name[5:].isdecimal()]
        state = self._fs.get_file_info([f"{self._path}/{trial}/{name}/{STATE}" for name in names])
        return sorted(int(n[5:]) for n, s in zip(names, state, strict=True) if s.type == fs.FileType.File)

    @contextmanager
    def latest(self, trial: str) -> Iterator[Path | None]:
        """The newest checkpoint of a trial as a local folder."""
        steps = self.steps(trial)
        if not steps:
            yield None
            return
        there = f"{self._path}/{trial}/step-{steps[-1]:08d}"
        if self._local:
            yield Path(there)
            return
        with tempfile.TemporaryDirectory(prefix="manta-checkpoint-") as folder:
            fs.copy_files(there, folder, source_filesystem=self._fs, destination_filesystem=fs.LocalFileSystem())
            yield Path(folder)
