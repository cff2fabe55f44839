"""The base on the meta device as it would be held: shapes and no memory, for rehearsing a step before it is run.

What a GPU's fused kernels keep for the backward pass is written down here, since they cannot run on shapes: Liger's
RMSNorm keeps its input, Liger's SwiGLU its two inputs, in whose place their gradients go (Hsu et al. 2024,
arXiv:2410.10989).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orchestrator.base.attention import use
from orchestrator.base.linear import HELD, Int8Linear, NF4Linear
from orchestrator.base.load import empty_model
from orchestrator.base.low_rank import LowRank
from orchestrator.base.model import decoder_layers, text_config
from orchestrator.base.norm import is_norm
from orchestrator.config import Base

_FUSED = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen3")
"""Architectures whose norms and feed-forward blocks Liger's kernels take the place of (liger-kernel 0.6)."""


def empty_held(base: Base, dtype: torch.dtype, *, gpu: bool, encoder: bool, unquantized: frozenset[int]) -> Any:
    """An empty model with its linears as ``load_base`` would hold them, and its norms as it would compute them.

    Args:
        base: which, and how it is held.
        dtype: compute precision.
        gpu: whether it would be on a GPU, where fused kernels are.
        encoder: the bare transformer.
        unquantized: layers that are held as they are.
    """
    model = empty_model(base, dtype, encoder=encoder)
    model.requires_grad_(False).eval()
    model.config.use_cache = False
    _, layers = decoder_layers(model)
    kinds: dict[str, type[NF4Linear | Int8Linear]] = {**HELD, "nf4": _EmptyNF4}
    for index, layer in enumerate(layers):
        if (kind := kinds.get(base.quantize)) and index not in unquantized:
            _hold(layer, kind, dtype)
    if gpu and base.kernels != "none" and text_config(model).model_type in _FUSED:
        _fuse(model)
    use(model)
    return model


def bytes_of(model: Any) -> int:
    """Bytes of parameters and quantization state."""
    own: int = sum(p.numel() * p.element_size() for p in model.parameters())
    return own + state_bytes_of(model)


def state_bytes_of(model: Any) -> int:
    """Of these, quantization state that every rank holds."""
    return sum(m.state_bytes() for m in model.modules() if isinstance(m, NF4Linear))


class _EmptyNF4(NF4Linear):
    """Sizes of an NF4 linear; makes its dense weight as the GPU's kernel does, in one tensor.

    Not by bitsandbytes: what that keeps for the process would be on the meta device for all that come later.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, transposed: bool = False) -> None:
        super(NF4Linear, self).__init__(weight_OI, bias_O, dtype, transposed)
        packed = torch.empty(-(-weight_OI.numel() // 2), 1, dtype=torch.uint8, device=weight_OI.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.added: LowRank | None = None

    def dequantize(self, dtype: torch.dtype, added: LowRank | None = None) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)

    def state_bytes(self) -> int:
        """A byte for each block of 64, an fp32 for each 256 of these, and one more."""
        blocks = -(-self.out_features * self.in_features // 64)
        return blocks + 4 * -(-blocks // 256) + 4


def _hold(layer: nn.Module, kind: type[NF4Linear | Int8Linear], dtype: torch.dtype) -> None:
    for name, module in list(layer.named_modules()):
        if name and isinstance(module, nn.Linear | Conv1D):
            parent, _, child = name.rpartition(".")
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            made = kind(weight.data, module.bias, dtype, isinstance(module, Conv1D))
            setattr(layer.get_submodule(parent), child, made)


def _fuse(model: Any) -> None:
    for module in model.modules():
        if is_norm(module):
            module.forward = _Norm.apply
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            module.forward = _gated(module)


def _gated(block: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = block.down_proj(_Gated.apply(block.gate_proj(x), block.up_proj(x)))  # type: ignore[no-untyped-call]
        return y

    return forward


class _Norm(torch.autograd.Function):
    """Liger's RMSNorm: keeps the input and a number for each token; the gradient goes where that of the output is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Gated(torch.autograd.Function):
    """Liger's SwiGLU: keeps both inputs; their gradients take their places."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate, up
