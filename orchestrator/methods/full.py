"""Full fine-tuning, the baseline: ``W' = W + D`` for every parameter of a dense base; every ``D`` starts at zero.

D is kept apart from W so that it is saved, swapped, merged and served like any delta. That costs 18 bytes per parameter
(W 2 in bf16; D, its gradient and AdamW's two moments 4 each in fp32) where training in place takes 16, and a second
matrix product in each linear. Solo.
"""

from typing import Any

from orchestrator.config.method import Full as Knobs
from orchestrator.errors import MethodError
from orchestrator.methods.last_layers import LastLayers
from orchestrator.methods.method import Hook, Scope


class Full(LastLayers):
    """See the module."""

    name = "full"
    knobs = Knobs
    packs = False

    def sites(self, knobs: Any, scope: Scope) -> dict[str, Hook]:
        """Every linear, normalization layer and embedding, and the head."""
        if scope.others:
            raise MethodError(
                f"full fine-tuning trains linear, normalization and embedding layers; {scope.others[0]} is none of them"
            )
        found = [*scope.embeddings, *scope.linears, *scope.norms, *([scope.head] if scope.head else [])]
        return dict.fromkeys(found, "output")

    def shared(self, knobs: Knobs, scope: Scope) -> dict[str, str]:
        """A tied head uses the change of the word embedding."""
        return {scope.head: scope.words} if scope.head and scope.tied else {}

    def unquantized(self, knobs: Any, count: int) -> frozenset[int]:
        """All; a quantized base is refused by the config."""
        return frozenset(range(count))
