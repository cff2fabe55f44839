"""The loss in the head against torch's own cross-entropy."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from orchestrator.data.batch import IGNORE
from orchestrator.train import loss
from orchestrator.train.loss import _TokenLoss


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_bytes", [4 * 50 * 3, 4 * 50 * 200, 2**28])
def test_losses_and_gradient_are_torchs(bias: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 3, 128 and all rows."""
    monkeypatch.setattr(loss, "_CHUNK_BYTES", chunk_bytes)
    h_NH, weight_VH = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16)
    bias_V, labels_N = torch.randn(50) if bias else None, torch.randint(0, 50, (300,))
    scale_N = torch.rand(300)
    got = _TokenLoss.apply(h_NH, weight_VH, bias_V, labels_N)
    want = nn.functional.cross_entropy(nn.functional.linear(h_NH, weight_VH, bias_V), labels_N, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad((got * scale_N).sum(), h_NH)
    (want_grad,) = torch.autograd.grad((want * scale_N).sum(), h_NH)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-5)


def test_rows_that_are_no_targets_count_nothing() -> None:
    """As if they were not there, even where their logits are no numbers."""
    h_NH, weight_VH = torch.randn(8, 16), torch.randn(50, 16)
    labels_N = torch.randint(0, 50, (8,))
    labels_N[[1, 4]], h_NH[4] = IGNORE, float("nan")
    h_NH.requires_grad_()
    got = _TokenLoss.apply(h_NH, weight_VH, None, labels_N)
    (grad,) = torch.autograd.grad(got.sum(), h_NH)
    kept = labels_N != IGNORE
    want = _TokenLoss.apply(h_NH[kept], weight_VH, None, labels_N[kept])
    (want_grad,) = torch.autograd.grad(want.sum(), h_NH)
    assert torch.equal(got[kept], want)
    assert torch.equal(grad, want_grad)
    assert not got[~kept].any()


_KERNEL = """
import torch
from orchestrator.base.loss_kernel import cross_entropy_

for rows, size in ((3, 100), (2, 8192), (2, 20000)):
    logits, labels = torch.randn(rows, size) * 5, torch.randint(0, size, (rows,))
    plain = logits.clone().requires_grad_()
    want = torch.nn.functional.cross_entropy(plain, labels, reduction="none")
    want.sum().backward()
    torch.testing.assert_close(cross_entropy_(logits, labels), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, plain.grad, rtol=1e-4, atol=1e-5)
    assert not cross_entropy_(logits, torch.full_like(labels, -100)).any()
    assert not logits.any()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton comes with torch's CUDA builds")
def test_the_kernel_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
