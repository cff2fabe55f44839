"""A linear whose whole input belongs to one low-rank change: ``x (W + s B A)^T`` in one product.

Adding the change to the weight costs a pass over the weight, which dequantization makes anyway; adding it to the
output costs passes over the output, twice in forward and twice in backward. Only where the weight has to be made for
each pass (4 bits) is that a gain, and only there does rounding the sum lose nothing: the weight's own value is not on
the 16-bit grid, so what is rounded off is as large, and as random, as without the change.

It even keeps what adding to the output loses. A base output in bf16 is on the grid already, so a change below half a
step of it, such as that of the first updates at a small learning rate, is rounded away whole; in the sum with the
weight, which is rounded once, it comes through on average.

Shapes: N tokens, O outputs, I inputs, R rank.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``s B A``."""

    a_RI: Tensor
    """A, fp32; takes part in gradients."""
    b_OR: Tensor
    """B, fp32; takes part in gradients."""
    scale: float
    """s."""


class Layer(Protocol):
    """A linear that makes its weight when asked."""

    def dequantize(self, dtype: torch.dtype, added: LowRank | None = None) -> Tensor:
        """Dense weight [O, I], with a change added where one is given."""


class _Pass:
    """What the two halves of one call share; the weight is made anew in backward, never kept."""

    def __init__(self, layer: Layer, added: LowRank) -> None:
        self.layer = layer
        self.added = LowRank(added.a_RI.detach(), added.b_OR.detach(), added.scale)
        self.wants_x = True
        self.grad_NO: Tensor | None = None


class _Keep(torch.autograd.Function):
    """Identity of x that keeps what the gradients of A and B need.

    Apart from the product, and before it: a recomputation ends where the last kept tensor is at hand, so the product
    of a layer's last linear is not made a second time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, both: _Pass) -> Tensor:
        """x itself."""
        both.wants_x = ctx.needs_input_grad[0]
        ctx.both = both
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Gradients of x, A and B: ``dA = s (dY B)^T x``, ``dB = s dY^T (x A^T)``."""
        (x,) = ctx.saved_tensors
        both: _Pass = ctx.both
        assert both.grad_NO is not None
        grad_NO, both.grad_NO = both.grad_NO, None
        x_NI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = both.added.a_RI, both.added.b_OR
        # The scale goes into the small factors.
        back_NR = grad_NO @ _scaled(b_OR, both.added.scale, x.dtype)
        h_NR = x_NI @ _scaled(a_RI, both.added.scale, x.dtype).T
        grad_a_RI = (back_NR.T @ x_NI).to(a_RI.dtype)
        grad_b_OR = (grad_NO.T @ h_NR).to(b_OR.dtype)
        return grad_x if both.wants_x else None, grad_a_RI, grad_b_OR, None


def _scaled(value: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The product, rounded to ``dtype``; one kernel on a GPU."""
    return torch.mul(value, scale, out=torch.empty_like(value, dtype=dtype))


class _Product(torch.autograd.Function):
    """The product with the changed weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, both: _Pass) -> Tensor:
        """``x (W + s B A)^T``."""
        ctx.both = both
        return x @ both.layer.dequantize(x.dtype, both.added).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of x; that of the output is handed on to ``_Keep``, which comes next."""
        both: _Pass = ctx.both
        both.grad_NO = grad.reshape(-1, grad.shape[-1])
        if not both.wants_x:  # the first layer of a frozen base; nobody reads what stands in its place
            return grad.new_zeros(()).expand(*grad.shape[:-1], both.added.a_RI.shape[1]), None
        return grad @ both.layer.dequantize(grad.dtype, both.added), None


def product_with(x: Tensor, layer: Layer, added: LowRank) -> Tensor:
    """``x (W + s B A)^T``: [..., I] to [..., O]."""
    both = _Pass(layer, added)
    kept: Tensor = _Keep.apply(x, added.a_RI, added.b_OR, both)  # type: ignore[no-untyped-call]
    y: Tensor = _Product.apply(kept, both)  # type: ignore[no-untyped-call]
    return y
