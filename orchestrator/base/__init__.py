"""The frozen base: found, loaded shard by shard, quantized, identified. The only room that knows bitsandbytes."""

from orchestrator.base.encoder import is_encoder
from orchestrator.base.files import base_dir, load_tokenizer
from orchestrator.base.identity import source_identity
from orchestrator.base.linear import Int8Linear, NF4Linear, dense_weight, linear_shape
from orchestrator.base.load import FrozenBase, LoadReport, compute_dtype, load_base

__all__ = [
    "FrozenBase",
    "Int8Linear",
    "LoadReport",
    "NF4Linear",
    "base_dir",
    "compute_dtype",
    "dense_weight",
    "is_encoder",
    "linear_shape",
    "load_base",
    "load_tokenizer",
    "source_identity",
]
