"""A Triton kernel for the cross-entropy of rows of logits and its gradient, which takes the logits' place.

Each logit is read twice and written once; plain torch passes over fp32 copies of them a dozen times. A negative label
is no target: loss and gradient of its row are zero.
Shapes: C rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 8192


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(logits_ptr, labels_ptr, losses_ptr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * SIZE
    label = tl.load(labels_ptr + row)
    most = -float("inf")
    total = 0.0
    for at in range(0, SIZE, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        x = tl.load(logits_ptr + column, mask=column < SIZE, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(x - higher))
        most = higher
    log_z = most + tl.log(total)
    chosen = tl.load(logits_ptr + tl.maximum(label, 0)).to(tl.float32)
    tl.store(losses_ptr + row, tl.where(label >= 0, log_z - chosen, 0.0))
    tl.debug_barrier()  # the label's logit is read before it is overwritten
    for at in range(0, SIZE, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        x = tl.load(logits_ptr + column, mask=column < SIZE, other=-float("inf")).to(tl.float32)
        p = tl.exp(x - log_z) - tl.where(column == label, 1.0, 0.0)
        p = tl.where(label >= 0, p, 0.0)
        tl.store(logits_ptr + column, p.to(logits_ptr.dtype.element_ty), mask=column < SIZE)


def cross_entropy_(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Losses [C], fp32; ``softmax - onehot`` takes the place of the contiguous logits. No target: below zero."""
    losses_C = torch.empty(len(logits_CV), device=logits_CV.device, dtype=torch.float32)
    rows, size = logits_CV.shape
    _cross_entropy_kernel[(rows,)](logits_CV, labels_C, losses_C, SIZE=size, COLUMNS=_COLUMNS, num_warps=16)
    return losses_C
