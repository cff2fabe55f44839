"""Checkpoints: the delta, its optimizer, the data cursor. Megabytes, and loadable at any world size.

``state.json`` holds the schema and each trial's plain values; a folder per trial holds ``delta/`` (and ``best/``), a
delta folder like any other, and ``optimizer.safetensors`` with full logical tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from orchestrator.delta import Delta, load_delta, read_tensors, write_tensors
from orchestrator.errors import CheckpointError

SCHEMA = 2
STATE = "state.json"


@dataclass
class Best:
    """The best delta so far."""

    value: float | None = None
    """Its metric; None before the first evaluation."""
    step: int = 0
    """When it was seen."""
    since: int = 0
    """Evaluations since then."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All metrics at that step."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Copies on the CPU; empty before the first evaluation."""


@dataclass(frozen=True)
class Restored:
    """One trial, read back."""

    values: dict[str, Any]
    """Plain values."""
    optimizer: dict[str, Tensor]
    """Full logical tensors."""
    delta: Delta
    """The delta at that step."""
    best: Delta | None
    """The best delta before it."""


def write_state(folder: Path, trials: Mapping[str, Mapping[str, Any]]) -> None:
    """``state.json``; written last, so that a folder without it is no checkpoint."""
    (folder / STATE).write_text(json.dumps({"schema": SCHEMA, "trials": trials}, indent=2))


def write_optimizer(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """A trial's optimizer."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_tensors(folder / name / "optimizer.safetensors", dict(tensors))


def read_checkpoint(folder: Path, name: str) -> Restored:
    """One trial of a checkpoint.

    Raises:
        CheckpointError: the folder is no checkpoint, is of another schema, or does not hold the trial.
    """
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {e}") from e
    if state.get("schema") != SCHEMA:
        raise CheckpointError(f"{folder} has schema {state.get('schema')}, this version reads {SCHEMA}")
    if name not in state["trials"]:
        raise CheckpointError(f"{folder} holds {', '.join(state['trials'])}, not {name}")
    best = folder / name / "best"
    return Restored(
        values=state["trials"][name],
        optimizer=read_tensors(folder / name / "optimizer.safetensors"),
        delta=load_delta(folder / name / "delta", finite=False),
        best=load_delta(best) if best.is_dir() else None,
    )
