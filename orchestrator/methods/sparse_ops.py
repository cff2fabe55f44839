"""What the method sparse computes with: a product with a few entries of a matrix, and a choice of entries.

Shapes: G slots, M tokens of each, I inputs, O outputs, K chosen entries. ``index`` is o I + i.
"""

from typing import Any

import torch
from torch import Tensor

_FEW = 8
"""Entries are gathered one by one where that touches this many times fewer numbers than the dense matrix has."""


class SparseLinear(torch.autograd.Function):
    """``y = D x`` with D [O, I] zero but at ``index``; entries named twice add up.

    With many tokens D is made dense in the activations' dtype, in forward and again in backward, never in between.
    """

    @staticmethod
    def forward(ctx: Any, x_GMI: Tensor, values_GK: Tensor, index_GK: Tensor, outputs: int) -> Tensor:
        """y [G, M, O]."""
        ctx.save_for_backward(x_GMI, values_GK, index_GK)
        ctx.outputs = outputs
        if _few(x_GMI, index_GK, outputs):
            row_GMK, column_GMK = _places(x_GMI, index_GK)
            picked_GMK = x_GMI.float().gather(2, column_GMK) * values_GK.float().unsqueeze(1)
            y_GMO = picked_GMK.new_zeros(*x_GMI.shape[:2], outputs).scatter_add_(2, row_GMK, picked_GMK)
            return y_GMO.to(x_GMI.dtype)
        return torch.bmm(x_GMI, _dense(x_GMI, values_GK, index_GK, outputs).mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_GMO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of x, and of the entries: of ``dy^T x`` only those."""
        x_GMI, values_GK, index_GK = ctx.saved_tensors
        grad_x, grad_values = None, None
        if _few(x_GMI, index_GK, ctx.outputs):
            row_GMK, column_GMK = _places(x_GMI, index_GK)
            picked_GMK = grad_GMO.float().gather(2, row_GMK)
            if ctx.needs_input_grad[0]:
                grad_x = torch.zeros_like(x_GMI, dtype=torch.float32)
                grad_x = grad_x.scatter_add_(2, column_GMK, picked_GMK * values_GK.float().unsqueeze(1)).to(x_GMI.dtype)
            if ctx.needs_input_grad[1]:
                grad_values = (picked_GMK * x_GMI.float().gather(2, column_GMK)).sum(1).to(values_GK.dtype)
            return grad_x, grad_values, None, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(grad_GMO, _dense(x_GMI, values_GK, index_GK, ctx.outputs))
        if ctx.needs_input_grad[1]:
            whole_GN = torch.bmm(grad_GMO.mT, x_GMI).flatten(1)
            grad_values = whole_GN.gather(1, index_GK.long()).to(values_GK.dtype)
        return grad_x, grad_values, None, None


def _few(x_GMI: Tensor, index_GK: Tensor, outputs: int) -> bool:
    return _FEW * x_GMI.shape[1] * index_GK.shape[1] <= outputs * x_GMI.shape[2]


def _places(x_GMI: Tensor, index_GK: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input of each entry, for each token: [G, M, K]."""
    index_GMK = index_GK.long().unsqueeze(1).expand(-1, x_GMI.shape[1], -1)
    return index_GMK // x_GMI.shape[2], index_GMK % x_GMI.shape[2]


def _dense(x_GMI: Tensor, values_GK: Tensor, index_GK: Tensor, outputs: int) -> Tensor:
    """D [G, O, I]."""
    flat_GN = x_GMI.new_zeros(len(x_GMI), outputs * x_GMI.shape[2])
    return flat_GN.scatter_add_(1, index_GK.long(), values_GK.to(x_GMI.dtype)).view(len(x_GMI), outputs, -1)


def largest(scores: Tensor, count: int) -> Tensor:
    """Index [K] of the largest scores, ascending, int32."""
    return scores.flatten().topk(count, sorted=False).indices.sort().values.int()


def drawn(count: int, total: int, taken: Tensor, generator: torch.Generator) -> Tensor:
    """``count`` numbers below ``total``, none of them in ``taken``, each set of them equally likely; int32."""
    if 2 * (count + len(taken)) > total:
        free = torch.ones(total, dtype=torch.bool)
        free[taken.long()] = False
        found = free.nonzero().squeeze(1)
    else:
        found = torch.empty(0, dtype=torch.long)
        while len(found) < count:
            more = torch.randint(total, (2 * count,), generator=generator)
            found = torch.cat([found, more[~torch.isin(more, taken)]]).unique()  # type: ignore[no-untyped-call]
    return found[torch.randperm(len(found), generator=generator)[:count]].int()
