"""The attention function that every base calls: torch's scaled dot product, with room for a prefix of keys and values.

Shapes: B rows, H query heads, G key-value heads, T queries, L keys, P prefix length, D size of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "manta"
"""Its name among transformers' attention functions."""
_PREFIX = "manta_prefix"


def whole_rows(device: torch.device) -> Tensor:
    """The mask that says: each row is one sequence, padding, if any, at its end; so being causal is all it takes.

    For a model that ``use`` has seen, and whose layers look back over all of a row (``looks_back``). transformers would
    find it out by reading the positions, which waits for the device.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def looks_back(model: Any, length: int) -> bool:
    """Whether every layer calls this module's attention and sees all that stands before it in ``length`` tokens."""
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return config._attn_implementation == NAME and all(w is None or w >= length for w in windows)


@dataclass(frozen=True)
class Prefix:
    """Keys and values that stand before those of each row."""

    key_BGPD: Tensor
    """Keys, as they are after any rotation."""
    value_BGPD: Tensor
    """Values."""
    seen_BP: Tensor
    """Which of them a row sees; a row without a prefix sees none."""


def attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``; where ``set_prefix`` was called for the module, every query sees its row's prefix too."""
    if attention_mask is not None and attention_mask.shape[2:] == (1, 1) and key_BGLD.shape[2] > 1:
        attention_mask = None  # ``whole_rows``
    prefix: Prefix | None = module.__dict__.pop(_PREFIX, None)
    if prefix is not None:
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            attention_mask = _plain_mask(query_BHTD.shape[2], key_BGLD.shape[2], causal, query_BHTD.device)
        attention_mask = _with_prefix(attention_mask, prefix, query_BHTD)
        key_BGLD = torch.cat([prefix.key_BGPD.to(key_BGLD.dtype), key_BGLD], dim=2)
        value_BGLD = torch.cat([prefix.value_BGPD.to(value_BGLD.dtype), value_BGLD], dim=2)
    made: tuple[Tensor, None] = sdpa_attention_forward(
        module, query_BHTD, key_BGLD, value_BGLD, attention_mask, is_causal=is_causal, **kwargs
    )
    return made


def set_prefix(module: nn.Module, prefix: Prefix) -> None:
    """What the module's attention sees before its own keys, the next time it is computed."""
    module.__dict__[_PREFIX] = prefix


def forget_prefix(module: nn.Module) -> bool:
    """Whether a prefix was set that no attention has seen since: then the module calls another function than this."""
    return module.__dict__.pop(_PREFIX, None) is not None


def _plain_mask(queries: int, keys: int, causal: bool, device: torch.device) -> Tensor:
    whole = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    return whole.tril(keys - queries) if causal else whole


def _with_prefix(mask: Tensor, prefix: Prefix, query_BHTD: Tensor) -> Tensor:
    """A boolean or additive mask [B or 1, 1, T, L], made longer by the prefix: [B, 1, T, P + L]."""
    rows, _, queries, _ = query_BHTD.shape
    seen = prefix.seen_BP[:, None, None, :].expand(rows, 1, queries, -1)
    if mask.dtype != torch.bool:
        low = torch.finfo(mask.dtype).min
        seen = torch.zeros(seen.shape, dtype=mask.dtype, device=seen.device).masked_fill(~seen, low)
    return torch.cat([seen, mask.expand(rows, mask.shape[1], -1, -1)], dim=-1)


def use(model: Any) -> None:
    """Let a model that would call transformers' ``sdpa`` call this instead."""
    for config in (model.config, model.config.get_text_config()):
        if config._attn_implementation == "sdpa":
            config._attn_implementation = NAME


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
