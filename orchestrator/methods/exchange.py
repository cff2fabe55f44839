"""From a slot's tensors to those of a delta's files, and back: peft's names and layout where peft has the method."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from orchestrator.config import CausalLM, Classification, Task
from orchestrator.errors import MethodError
from orchestrator.methods.scope import Scope
from orchestrator.methods.table import HEAD, HEAD_MODULES, method_of

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


def task_from_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Task:
    """The task of a plain peft folder. A classification's labels are numbers, its pooling that of transformers' model.

    Args:
        config: content of ``adapter_config.json``.
        tensors: those of the file, without peft's own prefix.

    Raises:
        MethodError: the head is not one linear layer on the last token (a decoder's) or on the base's pooler (BERT's).
    """
    if config.get("task_type") != "SEQ_CLS":
        return CausalLM()
    held = sorted(name for name in tensors if name.split(".")[0] in HEAD_MODULES)
    if held not in (["score.weight"], ["classifier.bias", "classifier.weight"]):
        raise MethodError(
            f"the head of this sequence classification is {', '.join(held) or 'not in the folder'}; one that can be "
            "taken over is a single linear layer: `score` on the last token of a decoder, `classifier` on the pooler "
            "of an encoder such as BERT"
        )
    count = len(tensors[held[-1]])
    return Classification(
        labels=tuple(map(str, range(count))), pooling="last" if held == ["score.weight"] else "pooler"
    )


def _head_sites(task: Task, scope: Scope) -> list[str]:
    return list(HEAD.sites(task, scope)) if isinstance(task, Classification) else []
