"""Bases that are read, not continued: which are encoders, and how to call the bare transformer on packed rows.

A decoder cuts attention where positions restart. An encoder does not, so it is given a mask: a token sees those of its
own segment. Shapes: B rows, T tokens, H hidden size, P segments that are pooled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from orchestrator.base.files import base_dir
from orchestrator.base.model import text_config
from orchestrator.config import Base
from orchestrator.errors import BaseModelError


def is_encoder(base: Base) -> bool:
    """Whether a base is one that reads both ways, such as BERT: transformers has it as a masked language model."""
    try:
        config = AutoConfig.from_pretrained(str(base_dir(base)), trust_remote_code=base.trust_remote_code)
    except (OSError, ValueError, KeyError) as e:
        raise BaseModelError(f"base {base.id}: its config.json cannot be read: {e}") from e
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes


def first_position(model: Any) -> int:
    """The position of a text's first token: 0, or behind the padding's where a model counts so (RoBERTa)."""
    tables = (m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] == "position_embeddings")
    table = next((m for m in tables if isinstance(m, nn.Embedding)), None)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def most_positions(model: Any) -> int | None:
    """Most tokens of a text that an encoder takes; None where there is no such bound."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    return None if most is None else int(most) - first_position(model)


class Reader:
    """Calls a bare transformer, encoder or decoder.

    Args:
        model: the transformer without a language-model head.
        encoder: whether it reads both ways.
        packed: whether rows hold several segments; else an encoder is given its own mask of what is no padding.
    """

    def __init__(self, model: Any, *, encoder: bool, packed: bool) -> None:
        self.model, self.encoder, self.packed = model, encoder, packed
        self.first = first_position(model) if encoder else 0

    def __call__(
        self, tokens_BT: Tensor, position_BT: Tensor, segment_BT: Tensor, padding_BT: Tensor, first_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, T, H], and what the base's own pooler makes of the tokens ``first_BT``: [P, H].

        Args:
            tokens_BT: token ids.
            position_BT: positions in the segment, from 0.
            segment_BT: which segment of the row a token is of.
            padding_BT: which tokens are padding.
            first_BT: the first token of each of P segments; None where the pooler is not asked.
        """
        own = {"use_cache": False} if not self.encoder else {}
        if self.encoder:  # padding may be longer than any text
            position_BT = position_BT.masked_fill(padding_BT, 0) + self.first
        with self._masked(segment_BT, padding_BT) as mask, self._pooled(first_BT):
            out = self.model(input_ids=tokens_BT, position_ids=position_BT, **mask, **own)
        return out.last_hidden_state, None if first_BT is None else out.pooler_output

    @contextmanager
    def _masked(self, segment_BT: Tensor, padding_BT: Tensor) -> Iterator[dict[str, Any]]:
        if not self.encoder:
            yield {}
        elif not self.packed:
            yield {"attention_mask": (~padding_BT).long()}
        elif _masks_inside(self.model):
            # What comes before the encoder takes no such mask. Recomputed layers get it as they got it first.
            mask = _same(segment_BT)
            handle = self.model.encoder.register_forward_pre_hook(lambda _, args: (args[0], mask, *args[2:]))
            try:
                yield {"attention_mask": torch.ones_like(segment_BT)}
            finally:
                handle.remove()
        else:
            yield {"attention_mask": _block_mask(self.model, segment_BT)}

    @contextmanager
    def _pooled(self, first_BT: Tensor | None) -> Iterator[None]:
        if first_BT is None:
            yield
            return
        handle = pooler(self.model).register_forward_pre_hook(lambda _, args: (args[0][first_BT].unsqueeze(1),))
        try:
            yield
        finally:
            handle.remove()


def pooler(model: Any) -> nn.Module:
    """The base's own pooler, which sees the first token.

    Raises:
        BaseModelError: it has none, or none that was trained with it.
    """
    found = getattr(model, "pooler", None)
    if not isinstance(found, nn.Module) or isinstance(found, nn.Linear):
        raise BaseModelError(
            f"{type(model).__name__} has no trained pooler of its own; take task.pooling: mean, first or last"
        )
    return found


def takes_blocks(model: Any) -> bool:
    """Whether an encoder can be told which tokens see each other; else its rows hold one sample each."""
    config = text_config(model)
    if _masks_inside(model):
        return not getattr(config, "conv_kernel_size", 0)  # a convolution over the row mixes neighbours
    return bool(model._supports_sdpa) and config._attn_implementation in ("manta", "sdpa", "eager")


POSITION_TABLE = "rel_embeddings"
"""What DeBERTa calls its embeddings of relative positions, a table that is read whole and never called."""


def sees_positions(model: Any, name: str) -> bool:
    """Whether a linear or normalization layer sees embeddings of relative positions, which all rows share (DeBERTa)."""
    if not _masks_inside(model):
        return False
    own = ("query_proj", "key_proj") if getattr(text_config(model), "share_att_key", False) else ()
    last = name.rsplit(".", 1)[-1]
    return last in ("pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj", *own) or name == "encoder.LayerNorm"


def _masks_inside(model: Any) -> bool:
    """Whether only the layers take a mask of pairs of tokens (DeBERTa)."""
    return str(text_config(model).model_type).startswith("deberta")


def _same(segment_BT: Tensor) -> Tensor:
    """Which tokens are of one segment: [B, 1, T, T]. Padding is one of its own."""
    return (segment_BT.unsqueeze(2) == segment_BT.unsqueeze(1)).unsqueeze(1)


def _block_mask(model: Any, segment_BT: Tensor) -> Any:
    """What the model's attention takes for it; one for each kind of layer where there are several (ModernBERT)."""
    config = text_config(model)
    same_B1TT = _same(segment_BT)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return _as_taken(same_B1TT, model)
    place_T = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    near_TT = (place_T.unsqueeze(1) - place_T).abs() <= config.sliding_window
    return {
        "full_attention": _as_taken(same_B1TT, model),
        "sliding_attention": _as_taken(same_B1TT & near_TT, model),
    }


def _as_taken(mask: Tensor, model: Any) -> Tensor:
    if text_config(model)._attn_implementation != "eager":
        return mask
    low = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, low)
