"""Prefix tuning: trained keys and values before each sequence, in every layer (Li & Liang 2021, arXiv:2101.00190).

``attention(q, [key; k], [value; v])``; ``key`` and ``value`` [P, G, D] (G key-value heads of size D) start normal with
the knob ``std``. Keys are as they are after any rotation, and positions begin at P, as in peft. The paper makes them
with a network that is thrown away after training; here they are trained as they are (peft without
``prefix_projection``). In layers with a sliding window every query sees the prefix (peft: only those near it).

Long, since peft keeps all layers in one table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orchestrator.config.method import Prefix as PrefixKnobs
from orchestrator.errors import DeltaError, MethodError
from orchestrator.methods.method import Hook, Method, Params, Scope, Shape

_FILE = "prompt_embeddings"
"""peft's name for all of it: [P, layers 2 G D], for each layer its keys, then its values."""


class Prefix(Method):
    """See the module."""

    name = "prefix"
    knobs = PrefixKnobs
    peft_type = "PREFIX_TUNING"

    def starts_as_base(self, knobs: PrefixKnobs) -> bool:
        """No: there are more keys to look at."""
        return False

    def prefix_length(self, knobs: PrefixKnobs) -> int:
        """P."""
        return knobs.tokens

    def sites(self, knobs: PrefixKnobs, scope: Scope) -> dict[str, Hook]:
        """Every attention module."""
        if not scope.attention:
            raise MethodError(
                "the method prefix puts keys and values into attention by torch's scaled dot product, and this base "
                "has attention of its own kind, or base.attention is not sdpa; the method prompt goes with any base"
            )
        return dict.fromkeys(scope.attention, "key_value")

    def shapes(self, knobs: PrefixKnobs, site: str, scope: Scope) -> dict[str, Shape]:
        """key and value [P, G, D]."""
        return dict.fromkeys(("key", "value"), (knobs.tokens, *scope.attention[site]))

    def start(self, knobs: PrefixKnobs, site: str, scope: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """Normal."""
        shapes = self.shapes(knobs, site, scope)
        return {name: torch.randn(shape, generator=generator) * knobs.std for name, shape in shapes.items()}

    def numbers(self, knobs: PrefixKnobs, site: str) -> dict[str, float]:
        """P."""
        return {"tokens": float(knobs.tokens)}

    def key_value(self, p: Params) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values, each [slots, G, P, D], and each slot's P."""
        return p.tensors["key"].transpose(1, 2), p.tensors["value"].transpose(1, 2), p.numbers["tokens"]

    def weight_change(
        self, knobs: Any, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """None: it is no change of the base."""
        return None

    def to_peft(self, knobs: PrefixKnobs, sites: Sequence[str], scope: Scope) -> dict[str, Any]:
        """peft's ``PrefixTuningConfig``."""
        heads, size = next(iter(scope.attention.values()))
        return {
            "peft_type": self.peft_type,
            "base_model_name_or_path": scope.base_id,
            "inference_mode": True,
            "num_virtual_tokens": knobs.tokens,
            "token_dim": heads * size,
            "num_attention_heads": heads,
            "num_layers": len(scope.attention),
            "num_transformer_submodules": 1,
            "encoder_hidden_size": heads * size,
            "prefix_projection": False,
        }

    def from_peft(self, config: Mapping[str, Any]) -> PrefixKnobs:
        """Knobs of peft's prefix tuning."""
        if config.get("prefix_projection"):
            raise MethodError(
                "this peft prefix has prefix_projection, which the method prefix does not do: peft saves only what the "
                "projection makes, and trains on by another network"
            )
        if not config.get("num_virtual_tokens"):
            raise MethodError("adapter_config.json has no num_virtual_tokens")
        return PrefixKnobs(tokens=int(config["num_virtual_tokens"]))

    def to_file(self, knobs: Any, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
        """In peft's layout."""
        parts = [tensors[f"{site}.{name}"].flatten(1) for site in scope.attention for name in ("key", "value")]
        return {_FILE: torch.cat(parts, dim=1)}

    def from_file(self, knobs: Any, tensors: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
        """Back from ``to_file``."""
        names = [f"{site}.{name}" for site in scope.attention for name in ("key", "value")]
        sizes = [heads * size for heads, size in scope.attention.values() for _ in range(2)]
        whole = tensors.get(_FILE)
        if whole is None or whole.dim() != 2 or whole.shape[1] != sum(sizes):
            found = "is missing" if whole is None else f"has shape {list(whole.shape)}"
            raise DeltaError(f"{_FILE} {found}; a prefix of this base has [tokens, {sum(sizes)}]")
        heads = [scope.attention[site] for site in scope.attention for _ in range(2)]
        parts = torch.split(whole, sizes, dim=1)
        return {n: t.reshape(-1, *shape) for n, t, shape in zip(names, parts, heads, strict=True)}
