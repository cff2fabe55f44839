"""One slot added into the weights of 4-bit linears: the same function as hooks beside them, at less work."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb

from orchestrator.base import load_base
from orchestrator.base.linear import NF4Linear
from orchestrator.base.low_rank import LowRank, product_with
from orchestrator.config import Base, Lora, Method, Train, Zero
from orchestrator.data import Sample
from orchestrator.methods import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.loss import causal_lm_loss
from orchestrator.train.step import Layout, Stepper
from orchestrator.train.trial import Trial
from tests import tiny

TOKENS_BT = torch.randint(3, tiny.VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))
ONE = torch.zeros_like(TOKENS_BT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


def base_of(folder: Path) -> Any:
    return load_base(Base(id=str(folder), quantize="nf4")).model


def bank_of(model: Any, *knobs: Method, fuse: bool) -> Bank:
    bank = Bank(model, fuse=fuse)
    for slot, own in enumerate(knobs):
        bank.add(slot, own, seed=slot)
        generator = torch.Generator().manual_seed(slot)
        for parameter in bank.parameters(slot).values():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return bank


def run(model: Any, bank: Bank, slot_BT: torch.Tensor = ONE, **route: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits, and gradients of slot 0."""
    bank.zero_grad()
    with bank.routed(slot_BT, **route):
        logits = model(input_ids=TOKENS_BT, use_cache=False).logits
        logits.square().mean().backward()
    bank.hand_out_gradients()
    return logits.detach(), {n: p.grad for n, p in bank.parameters(0).items()}


def assert_same(got: torch.Tensor, want: torch.Tensor, within: float = 1e-6) -> None:
    far = ((got - want).norm() / want.norm()).item()
    assert far <= within, f"{far:.1e} of the norm away"


def assert_same_run(
    got: torch.Tensor, grads: dict[str, torch.Tensor], want: torch.Tensor, want_grads: dict[str, torch.Tensor]
) -> None:
    """To what rounding adds up to through a model, in fp32."""
    assert_same(got, want, 1e-5)
    for name, grad in want_grads.items():
        assert_same(grads[name], grad, 1e-4)


def count_dense(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """From here on, for each dense weight that is made, whether a change was added."""
    made: list[bool] = []
    plain = NF4Linear.dequantize

    def counting(self: NF4Linear, dtype: torch.dtype, added: LowRank | None = None) -> torch.Tensor:
        made.append(added is not None)
        return plain(self, dtype, added)

    monkeypatch.setattr(NF4Linear, "dequantize", counting)
    return made


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "knobs", [Lora(rank=4, alpha=8), Lora(rank=8, rslora=True, targets=("q_proj", "down_proj")), Lora(start="pissa")]
)
def test_logits_and_gradients_are_those_of_hooks(
    knobs: Lora, recompute: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base_of(folder)
    want, want_grads = run(model, bank := bank_of(model, knobs, fuse=False))
    bank.detach()
    if recompute:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fused = bank_of(model, knobs, fuse=True)
    made = count_dense(model, monkeypatch)
    got, grads = run(model, fused)
    assert sum(made) > len(fused.sites(0))  # the fast way was taken, in forward and backward
    assert_same_run(got, grads, want, want_grads)


def test_an_untrained_slot_is_the_base(folder: Path) -> None:
    model = base_of(folder)
    plain = model(input_ids=TOKENS_BT, use_cache=False).logits
    bank = Bank(model, fuse=True)
    bank.add(0, Lora(rank=4))
    assert torch.equal(run(model, bank)[0], plain)
    bank.detach()
    assert torch.equal(model(input_ids=TOKENS_BT, use_cache=False).logits, plain)


@pytest.mark.parametrize("why", ["two slots", "some of the base", "dropout", "dora"])
def test_what_cannot_be_added_goes_beside(why: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs: tuple[Method, ...] = (Lora(rank=4, alpha=8),)
    slot_BT, route = ONE, {}
    if why == "two slots":
        knobs, slot_BT = (*knobs, Lora(rank=2)), torch.tensor([[0], [1], [0], [1]]).expand(4, 16)
    if why == "some of the base":
        slot_BT = torch.tensor([[0], [-1], [0], [-1]]).expand(4, 16)
    if why == "dropout":
        knobs, route = (Lora(rank=4, dropout=0.5),), {"steps": {0: 3}, "position_BT": ONE, "sample_BT": ONE}
    if why == "dora":
        knobs = (Lora(rank=4, dora=True),)
    model = base_of(folder)
    want, want_grads = run(model, bank := bank_of(model, *knobs, fuse=False), slot_BT, **route)
    bank.detach()
    made = count_dense(model, monkeypatch)
    got, grads = run(model, bank_of(model, *knobs, fuse=True), slot_BT, **route)
    assert not any(made)
    assert torch.equal(got, want)
    assert all(torch.equal(grads[n], g) for n, g in want_grads.items())


def test_a_slot_of_several_may_have_a_pass_to_itself(folder: Path) -> None:
    """Its rank is padded to that of the largest."""
    model = base_of(folder)
    both = (Lora(rank=2, alpha=8), Lora(rank=16))
    want, want_grads = run(model, bank := bank_of(model, *both, fuse=False))
    bank.detach()
    got, grads = run(model, bank_of(model, *both, fuse=True))
    assert_same_run(got, grads, want, want_grads)


def test_recomputation_spares_the_last_product(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven linears a layer: forward, again but for the last, and backward."""
    model = base_of(folder)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bank = bank_of(model, Lora(rank=4), fuse=True)
    made = count_dense(model, monkeypatch)
    run(model, bank)
    layers = model.config.num_hidden_layers
    assert len(made) == layers * (7 + 6 + 7)


@pytest.mark.parametrize("wants_x", [True, False])
def test_one_linear_against_double_precision(wants_x: bool) -> None:
    layer = NF4Linear(torch.randn(32, 64), None, torch.float32)
    x_BTI = torch.randn(2, 4, 64, requires_grad=wants_x)
    a_RI, b_OR = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    given = [t for t in (x_BTI, a_RI, b_OR) if t.requires_grad]
    back_BTO = torch.randn(2, 4, 32)
    y_BTO = product_with(x_BTI, layer, LowRank(a_RI, b_OR, 0.5))
    grads = torch.autograd.grad(y_BTO, given, back_BTO)
    weight_OI = layer.dequantize(torch.float32).double() + 0.5 * b_OR.double() @ a_RI.double()
    want_BTO = x_BTI.double() @ weight_OI.T
    assert_same(y_BTO, want_BTO)
    for grad, want in zip(grads, torch.autograd.grad(want_BTO, given, back_BTO.double()), strict=True):
        assert_same(grad, want)


def losses_of_a_run(folder: Path, precision: str, *, fuse: bool) -> torch.Tensor:
    """How far the loss has come after each of the first steps at a small learning rate."""
    model = load_base(Base(id=str(folder), quantize="nf4", precision=precision)).model
    bank = Bank(model, fuse=fuse)
    bank.add(0, Lora(rank=4, alpha=8))
    engine = Engine(Zero(), stage=0, device=torch.device("cpu"), dtype=torch.float32)
    stepper = Stepper(model, bank, engine, causal_lm_loss, Layout(64, 8, False, 0))
    trial = Trial(bank, engine, 0, Train(lr=1e-4, steps=8, warmup=0.0, schedule="constant"), 8)
    drawn = torch.randint(3, tiny.VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))
    samples = [Sample(row, [True] * 64, key) for key, row in enumerate(drawn.tolist())]
    losses = []
    for _ in range(8):
        losses.append(stepper.train({0: samples}, {0: trial.step})[0])
        trial.update()
    return torch.tensor(losses) - losses[0]


def test_small_updates_in_16_bits_come_through_in_the_weight(folder: Path) -> None:
    """Beside the weight, they are rounded away: the first steps leave the loss where it was."""
    exact = losses_of_a_run(folder, "fp32", fuse=False)
    inside, beside = (losses_of_a_run(folder, "bf16", fuse=fuse) for fuse in (True, False))
    assert (inside - exact).norm() < 0.1 * exact.norm()
    assert (beside - exact).norm() > 0.3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_change_the_bits_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    layer = NF4Linear(torch.randn(96, 128) * 0.02, None, dtype)
    none = LowRank(torch.randn(4, 128), torch.zeros(96, 4), 2.0)
    want = bnb.dequantize_4bit(layer.weight.data, layer.state)
    assert want.dtype == dtype
    assert torch.equal(layer.dequantize(dtype, none), want)


_KERNEL = """
import torch
from bitsandbytes import functional as bnb
from orchestrator.base.linear import NF4Linear
from orchestrator.base.low_rank import LowRank
from orchestrator.base.nf4_kernel import dense_with

torch.manual_seed(0)
for outs, ins, rank in ((96, 128, 4), (130, 192, 16), (64, 576, 8), (40, 320, 33)):
    layer = NF4Linear(torch.randn(outs, ins) * 0.02, None, torch.float32)
    plain = bnb.dequantize_4bit(layer.weight.data, layer.state)
    none = LowRank(torch.randn(rank, ins), torch.zeros(outs, rank), 2.0)
    assert torch.equal(dense_with(layer.weight.data, layer.state, none, torch.float32), plain), (outs, ins, rank)
    some = LowRank(torch.randn(rank, ins), torch.randn(outs, rank) * 0.1, 0.5)
    want = plain + 0.5 * some.b_OR @ some.a_RI
    torch.testing.assert_close(dense_with(layer.weight.data, layer.state, some, torch.float32), want)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton comes with torch's CUDA builds")
def test_the_kernel_in_tritons_interpreter() -> None:
    """Its rounding to bf16 is left out: the interpreter cuts where a GPU rounds."""
    done = subprocess.run(
        [sys.executable, "-c", _KERNEL], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
