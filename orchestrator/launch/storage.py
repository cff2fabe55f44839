"""A run's folder in the storage, where Ray's own list of checkpoints cannot be trusted."""

import errno
import json
from pathlib import Path

from ray.train import Checkpoint

from orchestrator.errors import MantaError
from orchestrator.train.checkpoint import read_checkpoint

_LIST = "checkpoint_manager_snapshot.json"


def rescue(storage: str, run_id: str, name: str) -> str | None:
    """The newest whole checkpoint, where a full disk cut off Ray's list of them; None where the list is sound.

    Ray writes that list in place, so it is the first thing to be lost; the list is removed, or Ray would not start.
    """
    if "://" in storage:
        return None
    folder = Path(storage, run_id)
    listed = folder / _LIST
    try:
        json.loads(listed.read_text())
    except (OSError, ValueError):
        listed.unlink(missing_ok=True)
    else:
        return None
    for step in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_checkpoint(step, name)
        except MantaError:
            continue  # half-written
        return str(step)
    return None


def as_checkpoint(rescued: str | None) -> Checkpoint | None:
    """The same for Ray."""
    return Checkpoint(rescued) if rescued else None


def is_full(error: BaseException) -> bool:
    """Whether a disk that is full is behind an error, however deep."""
    text = f"[Errno {errno.ENOSPC}]"
    while True:
        if text in str(error):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__
