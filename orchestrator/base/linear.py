"""Linear layers of a frozen base, held in 4 or 8 bits, and dense access to any linear's weight.

Shapes: O outputs, I inputs. NF4: Dettmers et al. 2023 (arXiv:2305.14314), blocks of 64, double quantization.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from orchestrator.base.low_rank import LowRank, product_with

_BLOCK = 64
_SLICE = 2**18
"""Weights that a CPU quantizes at a time."""
_MOST_RANK = 256
"""Largest rank that is added into a weight."""


class _HeldMatmul(torch.autograd.Function):
    """``x W^T`` that keeps the layer, never the gathered weight.

    A view of the weight on ``ctx`` would keep a ZeRO-3 gather alive after DeepSpeed frees it; the layer's parameter
    is read again in backward, when DeepSpeed has gathered it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "NF4Linear | Int8Linear") -> Tensor:
        """Base output, without bias."""
        ctx.layer = layer
        return x @ layer.dequantize(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of the input; the weight has none."""
        return grad @ ctx.layer.dequantize(grad.dtype), None


class _HeldLinear(nn.Module):
    """What the quantized linears share."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = weight_OI.shape
        self.bias = None if bias_O is None else nn.Parameter(bias_O.to(dtype), requires_grad=False)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Dense weight [O, I]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``: [..., I] to [..., O]."""
        y: Tensor = _HeldMatmul.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class NF4Linear(_HeldLinear):
    """A linear whose weight is 4-bit NormalFloat in uint8, double-quantized (0.516 byte per weight)."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, transposed: bool = False) -> None:
        super().__init__(weight_OI, bias_O, dtype, transposed)
        packed, self.state = _quantize_nf4(weight_OI, dtype)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.added: LowRank | None = None
        """A change that the next forward pass adds into the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``: [..., I] to [..., O]."""
        added, self.added = self.added, None
        if added is None:
            return super().forward(x)
        y = product_with(x, self, added)
        return y if self.bias is None else y + self.bias

    def takes(self, added: LowRank) -> bool:
        """Whether the change can be added into this weight."""
        return self.in_features % _BLOCK == 0 and added.a_RI.shape[0] <= _MOST_RANK

    def dequantize(self, dtype: torch.dtype, added: LowRank | None = None) -> Tensor:
        """Dense weight [O, I]; with a change added, the sum is rounded once."""
        if added is None:
            dense: Tensor = bnb.dequantize_4bit(self.weight.data.view(-1, 1), self.state)
            return dense.to(dtype)
        if self.weight.is_cuda:
            from orchestrator.base.nf4_kernel import dense_with  # triton comes with torch's CUDA builds alone

            return dense_with(self.weight.data, self.state, added, dtype)
        exact = copy(self.state)
        exact.dtype = torch.float32
        plain: Tensor = bnb.dequantize_4bit(self.weight.data.view(-1, 1), exact)
        return plain.addmm_(added.b_OR, added.a_RI, alpha=added.scale).to(dtype)

    def state_bytes(self) -> int:
        """Bytes of the quantization state, which every rank holds."""
        inner = self.state.state2
        held = (self.state.absmax, self.state.offset, inner.absmax)
        return sum(t.numel() * t.element_size() for t in held)


def _quantize_nf4(weight_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Packed weight and double-quantized state.

    On a CPU, where bitsandbytes takes 14 bytes per weight, a slice of rows at a time; the bits are the same.
    """
    outs, ins = weight_OI.shape
    options = {"blocksize": _BLOCK, "quant_type": "nf4", "quant_storage": torch.uint8}
    if weight_OI.device.type != "cpu":
        packed, state = bnb.quantize_4bit(weight_OI.contiguous(), compress_statistics=True, **options)
        state.dtype = dtype
        return packed, state
    packed = torch.empty(-(-outs * ins // 2), 1, dtype=torch.uint8)
    absmax = torch.empty(-(-outs * ins // _BLOCK), dtype=torch.float32)
    rows = max(1, _SLICE // (ins * _BLOCK)) * _BLOCK  # whole blocks
    for at in range(0, outs, rows):
        part, state = bnb.quantize_4bit(weight_OI[at : at + rows].contiguous(), **options)
        packed[at * ins // 2 :][: len(part)] = part
        absmax[at * ins // _BLOCK :][: len(state.absmax)] = state.absmax
    offset = absmax.mean()
    inner, outer = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    whole = bnb.QuantState(
        absmax=inner,
        shape=weight_OI.shape,
        code=state.code,
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=outer,
    )
    return packed, whole


class Int8Linear(_HeldLinear):
    """A linear whose weight is int8 with one scale per output row (1 byte per weight)."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, transposed: bool = False) -> None:
        super().__init__(weight_OI, bias_O, dtype, transposed)
        scale_O1 = (weight_OI.float().abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.weight = nn.Parameter((weight_OI.float() / scale_O1).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale_O1, requires_grad=False)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Dense weight [O, I]."""
        return (self.weight.data.float() * self.scale.data).to(dtype)

    def state_bytes(self) -> int:
        """Bytes of the scales."""
        return self.out_features * 4


Linear = (nn.Linear, Conv1D, NF4Linear, Int8Linear)
HELD: dict[str, type[NF4Linear | Int8Linear]] = {"nf4": NF4Linear, "int8": Int8Linear}


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of any linear, whether or not its weight is here."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features  # type: ignore[return-value]


def is_transposed(module: nn.Module) -> bool:
    """Whether the model stores this linear's weight as [I, O] (GPT-2)."""
    return isinstance(module, Conv1D) or getattr(module, "transposed", False)


def linear_sites(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every linear under ``root``."""
    for name, module in root.named_modules(prefix=prefix):
        if isinstance(module, Linear):
            yield name, module


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, the module's own sharded parameters are whole on this rank. Every rank must enter."""
    own: Any = module.parameters(recurse=False)
    sharded = [p for p in own if hasattr(p, "ds_id") and p.ds_status.name != "AVAILABLE"]
    if sharded:
        sharded[0].all_gather(sharded)
    try:
        yield
    finally:
        if sharded:
            sharded[0].partition(sharded)


def dense_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The own parameters of any module, dense, fp32, on the CPU: a linear's weight [O, I], its bias [O]; copies.

    Those of an empty model stay empty.
    """
    with gathered(module):
        found = {n: _to_cpu(p.data.float()).clone() for n, p in module.named_parameters(recurse=False)}
    if isinstance(module, Linear):
        found = {n: p for n, p in found.items() if n == "bias"} | {"weight": _to_cpu(dense_weight(module))}
    return found


def _to_cpu(value: Tensor) -> Tensor:
    return value if value.is_meta else value.cpu()


def project(module: nn.Module, x: Tensor) -> Tensor:
    """``x W^T`` of any linear whose weight is here, without its bias: [..., I] to [..., O]; no gradient of W."""
    if isinstance(module, _HeldLinear):
        y: Tensor = _HeldMatmul.apply(x, module)  # type: ignore[no-untyped-call]
        return y
    assert isinstance(module.weight, Tensor)
    weight = module.weight.detach().to(x.dtype)
    return x @ weight if isinstance(module, Conv1D) else x @ weight.T


def dense_weight(module: nn.Module) -> Tensor:
    """fp32 weight [O, I] of any linear: dense, quantized, transposed (GPT-2) or sharded; a copy."""
    with gathered(module):
        if isinstance(module, _HeldLinear):
            return module.dequantize(torch.float32).clone()
        assert isinstance(module.weight, Tensor)
        weight = module.weight.data.float()
        return (weight.T if isinstance(module, Conv1D) else weight).contiguous().clone()
