"""Every method by name. A new one is its file, its knobs and one line here."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.config import Knobs
from orchestrator.errors import MethodError
from orchestrator.methods.bitfit import BitFit
from orchestrator.methods.head import Head
from orchestrator.methods.ia3 import IA3
from orchestrator.methods.lora import LoRA
from orchestrator.methods.method import Method
from orchestrator.methods.norms import Norms
from orchestrator.methods.scope import Scope
from orchestrator.methods.sparse import Sparse

METHODS: dict[str, Method] = {
    "lora": LoRA(),
    "bitfit": BitFit(),
    "sparse": Sparse(),
    "norms": Norms(),
    "ia3": IA3(),
}
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


def knobs_from_peft(config: Mapping[str, Any]) -> Any:
    """Knobs read off an ``adapter_config.json``.

    Raises:
        MethodError: peft's type has no counterpart here, or asks for something that it does not do.
    """
    kind = config.get("peft_type")
    found = next((m for m in METHODS.values() if m.peft_type is not None and m.peft_type == kind), None)
    if found is None:
        known = ", ".join(sorted(m.peft_type for m in METHODS.values() if m.peft_type))
        raise MethodError(f"peft type {kind!r} has no counterpart here; there is {known}")
    return found.from_peft(config)
