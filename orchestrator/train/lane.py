"""Which trials can share a base. Imports no torch, so that a light process may ask."""

import hashlib
import json

from orchestrator.config import Full, LastLayers, Lora, Peft, Run


def lane_of(run: Run) -> str:
    """Trials of one lane share a base: its model and form, the task, and which layers are held unquantized."""
    shared = json.dumps([run.base.model_dump(mode="json"), run.task.type])
    return f"{_kind(run)}-{hashlib.sha256(shared.encode()).hexdigest()[:8]}"


def trains_alone(run: Run) -> bool:
    """Whether a pack of its lane has one slot."""
    return isinstance(run.method, Full | Peft)


def pack_run(run: Run) -> Run:
    """What ``pack`` is given for a trial's lane: its method says no more than which layers are held unquantized."""
    return run if _kind(run).startswith("last_layers") else run.model_copy(update={"method": Lora()})


def _kind(run: Run) -> str:
    if trains_alone(run):
        return "alone"
    if isinstance(run.method, LastLayers) and run.base.quantize != "none":
        return f"last_layers{run.method.layers}"
    return "shared"
