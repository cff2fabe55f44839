"""What a driver remembers of its runs, so that a later one can go on: ``$MANTA_HOME/runs/<id>.json``."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import home
from orchestrator.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """One run."""

    id: str
    """Name of its folder in the storage."""
    storage: str
    """Where its checkpoints are."""
    run: dict[str, Any]
    """Its config, resolved."""
    mlflow_run: str | None = None
    """MLflow's run id."""
    start: str | None = None
    """Folder of the delta it continues from."""


def write(entry: Entry) -> None:
    """Remember."""
    path = _path(entry.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.touch(mode=0o600)  # a tracking URI may hold a password
    part.write_text(json.dumps(asdict(entry), indent=2))
    part.replace(path)


def read(run_id: str) -> Entry:
    """Recall.

    Raises:
        CheckpointError: no run of that id was started here; names those that were.
    """
    path = _path(run_id)
    if not path.is_file():
        known = sorted((p for p in path.parent.glob("*.json")), key=lambda p: p.stat().st_mtime)
        latest = ", ".join(p.stem for p in known[-5:]) or "none"
        raise CheckpointError(f"no run {run_id!r} to resume in {path.parent}; the latest are: {latest}")
    return Entry(**json.loads(path.read_text()))


def _path(run_id: str) -> Path:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,90}", run_id):
        raise CheckpointError(f"{run_id!r} is not the id of a run")
    return home() / "runs" / f"{run_id}.json"
