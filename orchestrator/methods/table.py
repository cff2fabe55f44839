"""Every method by name. A new one is its file, its knobs and one line here."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.config import Classification, Knobs
from orchestrator.methods.bitfit import BitFit
from orchestrator.methods.bottleneck import Bottleneck
from orchestrator.methods.full import Full
from orchestrator.methods.head import Head
from orchestrator.methods.ia3 import IA3
from orchestrator.methods.last_layers import LastLayers
from orchestrator.methods.lora import LoRA
from orchestrator.methods.method import Method
from orchestrator.methods.norms import Norms
from orchestrator.methods.passthrough import Passthrough
from orchestrator.methods.prefix import Prefix
from orchestrator.methods.prompt import Prompt
from orchestrator.methods.scope import Scope
from orchestrator.methods.sparse import Sparse

METHODS: dict[str, Method] = {
    "bitfit": BitFit(),
    "bottleneck": Bottleneck(),
    "full": Full(),
    "ia3": IA3(),
    "last_layers": LastLayers(),
    "lora": LoRA(),
    "norms": Norms(),
    "peft": Passthrough(),
    "prefix": Prefix(),
    "prompt": Prompt(),
    "sparse": Sparse(),
}
HEAD_MODULES = ("score", "classifier")
"""What transformers' sequence classifiers call their heads, which peft saves whole beside the method."""
HEAD = Head()
"""Not a method of its own: what a classification task adds to a slot."""


def method_of(knobs: Knobs) -> Method:
    """The implementation for these knobs."""
    return METHODS[str(knobs.type)].variant(knobs)  # type: ignore[attr-defined]


def trained_parameters(knobs: Any, sites: Iterable[str], scope: Scope) -> int:
    """How many numbers the method trains at these sites."""
    method = method_of(knobs)
    borrowed = method.shared(knobs, scope)
    parts = [
        method.trained(knobs, name, shape)
        for site in sites
        if site not in borrowed
        for name, shape in method.shapes(knobs, site, scope).items()
    ]
    return sum(math.prod(part) for part in parts if part is not None)


def head_parameters(task: Classification, scope: Scope) -> int:
    """How many numbers a classification head has."""
    shapes = (shape for site in HEAD.sites(task, scope) for shape in HEAD.shapes(task, site, scope).values())
    return sum(math.prod(shape) for shape in shapes)


def knobs_from_peft(config: Mapping[str, Any]) -> Any:
    """Knobs read off an ``adapter_config.json``; of a type without a counterpart here, those that hand it through.

    Raises:
        MethodError: peft has no such type, or it asks for something that is not done here.
    """
    kind = config.get("peft_type")
    found = next((m for m in METHODS.values() if m.peft_type is not None and m.peft_type == kind), METHODS["peft"])
    if config.get("task_type") == "SEQ_CLS" and set(config.get("modules_to_save") or ()) <= set(HEAD_MODULES):
        config = {**config, "modules_to_save": None}  # the head is the task's
    return found.from_peft(config)
