"""Next-token loss of the target tokens only, without ever holding all their logits.

Shapes: B rows, T tokens, H hidden size, V vocabulary, N target tokens of the micro-batch, C tokens of a chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.base.linear import is_transposed
from orchestrator.base.model import head
from orchestrator.data.batch import IGNORE, Batch

_CHUNK_BYTES = 256 * 2**20
_MULTIPLE = 128  # rows that a GPU's tiles divide


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy of each row of ``softmax(h W^T + b)``; the gradient of h is made in the forward pass.

    So the head's weight is needed once, while it is gathered, and at most one chunk of logits is alive.
    """

    @staticmethod
    def forward(ctx: Any, h_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> Tensor:
        """Losses [N], fp32."""
        losses_N = torch.empty(len(h_NH), device=h_NH.device, dtype=torch.float32)
        grad_NH = torch.empty_like(h_NH) if ctx.needs_input_grad[0] else None
        size = _CHUNK_BYTES // (h_NH.element_size() * weight_VH.shape[0])
        size = max(1, size // _MULTIPLE * _MULTIPLE or size)
        for at in range(0, len(h_NH), size):
            chunk = slice(at, at + size)
            logits_CV = h_NH[chunk] @ weight_VH.T
            if bias_V is not None:
                logits_CV += bias_V
            losses_N[chunk] = cross_entropy_(logits_CV, labels_N[chunk])
            if grad_NH is not None:
                grad_NH[chunk] = logits_CV @ weight_VH
        ctx.grad_NH = grad_NH
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the hidden states; the head is frozen."""
        return ctx.grad_NH * grad_N.unsqueeze(1).to(ctx.grad_NH.dtype), None, None, None


def cross_entropy_(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Losses [C], fp32, of logits that their gradient ``softmax - onehot`` takes the place of.

    Both are zero in rows whose label is ``IGNORE``.
    """
    if logits_CV.is_meta:  # a rehearsal of the kernel, which needs no memory beside its result
        return logits_CV.new_empty(len(logits_CV), dtype=torch.float32)
    if logits_CV.is_cuda:
        from orchestrator.base import loss_kernel  # triton comes with torch's CUDA builds alone

        return loss_kernel.cross_entropy_(logits_CV, labels_C)
    exact_CV = logits_CV.float()
    log_z_C1 = exact_CV.logsumexp(1, keepdim=True)
    ignored_C1 = (labels_C == IGNORE).unsqueeze(1)
    label_C1 = labels_C.unsqueeze(1).clamp_min(0)
    losses_C1 = (log_z_C1 - exact_CV.gather(1, label_C1)).masked_fill_(ignored_C1, 0)
    p_CV = (exact_CV - log_z_C1).exp_()
    p_CV.scatter_add_(1, label_C1, torch.full_like(p_CV[:, :1], -1))
    logits_CV.copy_(p_CV.masked_fill_(ignored_C1, 0))
    return losses_C1.squeeze(1)


def causal_lm_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses [N] of the target tokens, fp32, and the slot [N] of each; computed in the head.

    Sequences of a packed row do not see each other: transformers builds the block mask from positions that restart.
    Right where nothing changes the logits after the head; ``probe`` looks, and ``plain_loss`` is for the others.
    """
    labels = batch.labels_BT.flatten()
    at_N = (labels != IGNORE).nonzero().squeeze(1)  # here, where there is nothing yet for the device to wait for
    with loss_in_place_of_logits(head(model), at_N, labels[at_N]):
        return _call(model, batch), batch.slot_BT.flatten()[at_N.to(batch.slot_BT.device)]


def fixed_loss(model: Any, batch: Batch, attention_mask: Tensor | None = None) -> Tensor:
    """The same losses, of every token [B T]: zero where a token is no target. No shape depends on a value."""
    with loss_in_place_of_logits(head(model), None, batch.labels_BT.reshape(-1)):
        return _call(model, batch, attention_mask=attention_mask)


def plain_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same from the model's own logits, all of them at once."""
    wanted_BT = batch.labels_BT != IGNORE
    logits_NV = _call(model, batch)[wanted_BT].float()
    losses_N = nn.functional.cross_entropy(logits_NV, batch.labels_BT[wanted_BT], reduction="none")
    return losses_N, batch.slot_BT[wanted_BT.to(batch.slot_BT.device)]


def _call(model: Any, batch: Batch, **options: Any) -> Tensor:
    out = model(input_ids=batch.tokens_BT, position_ids=batch.position_BT, use_cache=False, **options)
    logits: Tensor = out.logits
    return logits


@contextmanager
def loss_in_place_of_logits(module: Any, at_N: Tensor | None, labels_N: Tensor) -> Iterator[None]:
    """The head returns the losses of the tokens at these places, or of all; the hooks around it, such as DeepSpeed's
    gathering, stay."""

    def forward(h_BTH: Tensor) -> Tensor:
        weight = module.weight.T if is_transposed(module) else module.weight
        bias = getattr(module, "bias", None)
        h_NH = h_BTH.flatten(0, 1)
        if at_N is not None:
            h_NH = h_NH.index_select(0, at_N)
        losses: Tensor = _TokenLoss.apply(h_NH, weight, bias, labels_N)  # type: ignore[no-untyped-call]
        return losses

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
