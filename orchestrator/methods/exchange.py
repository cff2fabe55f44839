"""From a slot's tensors to those of a delta's files, and back: peft's names and layout where peft has the method."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from orchestrator.config import CausalLM, Classification, Task
from orchestrator.methods.scope import Scope
from orchestrator.methods.table import HEAD, method_of

_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "classification": "SEQ_CLS"}


def to_files(
    knobs: Any, task: Task, tensors: Mapping[str, Tensor], sites: Sequence[str], scope: Scope
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as they are named in the file, without peft's own prefix, and ``adapter_config.json``."""
    method = method_of(knobs)
    heads = _head_sites(task, scope)
    own = {n: t for n, t in tensors.items() if n.rsplit(".", 1)[0] not in heads}
    config = {**method.to_peft(knobs, sites, scope), "task_type": _TASK_TYPES[task.type]}
    if heads:
        config["modules_to_save"] = heads
    rest = {n: t for n, t in tensors.items() if n not in own}
    return {**method.to_file(knobs, own, scope), **rest}, config


def from_files(knobs: Any, task: Task | None, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
    """A slot's tensors from those of the file."""
    heads = _head_sites(task or CausalLM(), scope)
    own = {n: t for n, t in tensors.items() if n.rsplit(".", 1)[0] not in heads}
    rest = {n: t for n, t in tensors.items() if n not in own}
    return {**method_of(knobs).from_file(knobs, own, scope), **rest}


def _head_sites(task: Task, scope: Scope) -> list[str]:
    return list(HEAD.sites(task, scope)) if isinstance(task, Classification) else []
