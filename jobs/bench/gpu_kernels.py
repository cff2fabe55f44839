"""The kernels of a training step alone, on one GPU: are they right, how fast are they, beside what they replace.

    python jobs/bench/gpu_kernels.py

Shapes: N tokens, O outputs, I inputs, R rank, V vocabulary.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from orchestrator.base.linear import NF4Linear
from orchestrator.base.low_rank import LowRank, product_with

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
"""(O, I) of the linears of an 8B Llama."""
BF16 = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 512])
    parser.add_argument("--vocabulary", type=int, default=128256)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}")
    parts: list[tuple[Callable[..., None], tuple[int, ...]]] = [(dense_weights, ()), (losses, (args.vocabulary,))]
    for part, given in [*parts, *((products, (n,)) for n in args.tokens)]:
        try:
            part(*given)
        except Exception as e:  # the next part may tell more
            print(f"FAILED {type(e).__name__}: {str(e)[:1500]}", flush=True)


def _ms(do: Callable[..., Any], *args: Any, **options: Any) -> float:
    from triton.testing import do_bench

    return float(do_bench(lambda: do(*args, **options), warmup=10, rep=60, return_mode="median"))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def _layer(outs: int, ins: int) -> NF4Linear:
    return NF4Linear(_random(outs, ins) * 0.02, None, BF16)


def _change(outs: int, ins: int, rank: int = 16) -> LowRank:
    a_RI = torch.randn(rank, ins, device="cuda") * 0.02
    return LowRank(a_RI.requires_grad_(), (torch.randn(outs, rank, device="cuda") * 0.02).requires_grad_(), 2.0)


def dense_weights() -> None:
    """``W + s B A`` against bitsandbytes' dequantization: bits, distance from fp64, time of some tilings."""
    from orchestrator.base.nf4_kernel import dense_with

    for outs, ins in SHAPES:
        layer, some = _layer(outs, ins), _change(outs, ins)
        some = LowRank(some.a_RI.detach(), some.b_OR.detach(), some.scale)
        plain = bnb.dequantize_4bit(layer.weight.data, layer.state)
        none = LowRank(some.a_RI, torch.zeros_like(some.b_OR), 2.0)
        same = torch.equal(dense_with(layer.weight.data, layer.state, none, BF16), plain)
        exact = dense_with(layer.weight.data, layer.state, none, torch.float32).double()
        want = exact + 2.0 * some.b_OR.double() @ some.a_RI.double()
        got = dense_with(layer.weight.data, layer.state, some, BF16).double()
        far = ((got - want).norm() / want.norm()).item()
        rounded = ((want.to(BF16).double() - want).norm() / want.norm()).item()
        floor = (outs * ins * 2.52) / 3.35e12 * 1e3
        print(
            f"dense {outs} x {ins}: bits as bitsandbytes {same}; far {far:.2e} (rounding alone {rounded:.2e}); "
            f"bitsandbytes {_ms(bnb.dequantize_4bit, layer.weight.data, layer.state):.4f} ms, "
            f"bytes at 3.35 TB/s {floor:.4f} ms"
        )
        for rows, tiles, warps in ((32, 8, 4), (64, 4, 4), (64, 8, 4), (64, 16, 4), (128, 8, 8)):
            options = {"rows": rows, "tiles": tiles, "warps": warps}
            ms = _ms(dense_with, layer.weight.data, layer.state, some, BF16, **options)
            print(f"    rows {rows}, tiles {tiles}, warps {warps}: {ms:.4f} ms", flush=True)


def products(tokens: int) -> None:
    """The large products, the small ones of the gradients, and one linear whole, forward and backward."""
    for outs, ins in SHAPES:
        x_NI, y_NO, w_OI = _random(tokens, ins), _random(tokens, outs), _random(outs, ins)
        a_RI, b_OR, h_NR = _random(16, ins), _random(outs, 16), _random(tokens, 16)
        work = 2 * tokens * outs * ins / 1e9
        forward, back = _ms(torch.mm, x_NI, w_OI.T), _ms(torch.mm, y_NO, w_OI)
        small = {
            "x A'": _ms(torch.mm, x_NI, a_RI.T),
            "dY B": _ms(torch.mm, y_NO, b_OR),
            "dY' h": _ms(torch.mm, y_NO.T, h_NR),
            "t' x": _ms(torch.mm, h_NR.T, x_NI),
        }
        said = ", ".join(f"{k} {v:.4f}" for k, v in small.items())
        layer, some = _layer(outs, ins), _change(outs, ins)
        x_NI.requires_grad_()

        def step(x: Tensor = x_NI, layer: NF4Linear = layer, some: LowRank = some, y: Tensor = y_NO) -> None:
            torch.autograd.grad(product_with(x, layer, some), (x, some.a_RI, some.b_OR), y)

        print(
            f"{tokens} tokens, {outs} x {ins}: x W' {forward:.4f} ms ({work / forward:.0f} TFLOP/s), dY W {back:.4f} "
            f"({work / back:.0f}); {said}; whole {_ms(step):.4f}",
            flush=True,
        )


def losses(vocabulary: int) -> None:
    """The cross-entropy kernel against fp64, and its time beside plain torch's."""
    from orchestrator.base.loss_kernel import cross_entropy_

    logits, labels = _random(1024, vocabulary) * 3, torch.randint(0, vocabulary, (1024,), device="cuda")
    exact = logits[:64].double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, labels[:64], reduction="none")
    (grad,) = torch.autograd.grad(want.sum(), exact)
    made = logits[:64].clone()
    got = cross_entropy_(made, labels[:64])
    far, far_grad = ((a - b).norm() / b.norm() for a, b in ((got.double(), want), (made.double(), grad)))
    print(f"loss: far {far:.1e}, its gradient {far_grad:.1e}")

    def plain() -> None:
        exact = logits.float()
        log_z = exact.logsumexp(1, keepdim=True)
        exact.sub_(log_z).exp_().to(BF16)

    ours = _ms(cross_entropy_, logits, labels)
    print(f"loss of 1024 x {vocabulary}: {ours:.3f} ms, plain torch {_ms(plain):.3f} ms", flush=True)


if __name__ == "__main__":
    main()
