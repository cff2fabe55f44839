"""Passes on fixed memory against plain ones; that a GPU replays them as it should, ``jobs/bench/gpu_profile.py`` shows.

Here the work that a GPU would record is done each time anew.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.base import load_base
from orchestrator.config import Base, Lora, Method, Prompt, Train, Zero
from orchestrator.data import Sample
from orchestrator.methods import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.graph import Graphs
from orchestrator.train.loss import causal_lm_loss
from orchestrator.train.step import Layout, Stepper
from orchestrator.train.trial import Trial
from tests import tiny

CPU = torch.device("cpu")
LENGTH = 40


def samples(*sizes: int) -> list[Sample]:
    """Every third token is no target."""
    generator = torch.Generator().manual_seed(sum(sizes))
    drawn = [torch.randint(3, tiny.VOCAB, (size,), generator=generator).tolist() for size in sizes]
    return [Sample(tokens, [i % 3 != 0 for i in range(len(tokens))], key) for key, tokens in enumerate(drawn)]


class Side:
    """A bank on a base, trained with recorded passes or without."""

    def __init__(
        self,
        folder: Path,
        *knobs: Method,
        packing: bool = True,
        record: Callable[[Any], Any] | None = None,
        quantize: str = "nf4",
        rows: int = 2,
    ) -> None:
        self.model = load_base(Base(id=str(folder), quantize=quantize)).model
        self.bank = Bank(self.model, fuse=True)
        for slot, own in enumerate(knobs):
            self.bank.add(slot, own, seed=slot)
            generator = torch.Generator().manual_seed(slot)
            for parameter in self.bank.parameters(slot).values():
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        self.warnings: list[str] = []
        self.graphs = record and Graphs(
            self.model, self.bank, device=CPU, length=LENGTH, warn=self.warnings.append, record=record
        )
        engine = Engine(Zero(), stage=0, device=CPU, dtype=torch.float32)
        layout = Layout(LENGTH, rows, packing, 0)
        self.stepper = Stepper(self.model, self.bank, engine, causal_lm_loss, layout, self.graphs or None)
        train = Train(lr=0.05, steps=9, warmup=0.0)
        self.start = lambda: [Trial(self.bank, engine, slot, train, 9) for slot in range(len(knobs))]
        self.trials = self.start()

    def step(self, *own: list[Sample]) -> dict[int, float]:
        losses = self.stepper.train(dict(enumerate(own)), {s: t.step for s, t in enumerate(self.trials)})
        for trial in self.trials:
            trial.update()
        return losses

    def gradients(self) -> dict[str, torch.Tensor]:
        slots = range(len(self.trials))
        return {f"{s}.{n}": p.grad.clone() for s in slots for n, p in self.bank.parameters(s).items()}


@pytest.fixture
def recorded() -> list[int]:
    """How often each recorded work was done."""
    return []


@pytest.fixture
def record(recorded: list[int]) -> Callable[[Any], Any]:
    def make(work: Any) -> Any:
        recorded.append(0)
        index = len(recorded) - 1

        def replay() -> None:
            recorded[index] += 1
            work()

        return replay

    return make


def assert_alike(ours: Side, plain: Side, *own: list[Sample]) -> None:
    """Losses and gradients of a step, to what rounding adds up to in fp32; then both have the same values again."""
    got, want = ours.step(*own), plain.step(*own)
    assert got == pytest.approx(want, rel=1e-5)
    grads = ours.gradients()
    for name, grad in plain.gradients().items():
        assert ((grads[name] - grad).norm() <= 1e-4 * grad.norm()).item(), name
    for slot in range(len(plain.trials)):
        for name, parameter in plain.bank.parameters(slot).items():
            ours.bank.parameters(slot)[name].data.copy_(parameter.data)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("arch", "knobs"), [("llama", Lora(rank=4)), ("llama", Prompt(tokens=5)), ("gpt2", Lora(rank=4))]
)
def test_steps_are_those_of_plain_passes(
    arch: str, knobs: Method, packing: bool, tmp_path: Path, record: Any, recorded: list[int]
) -> None:
    """Rows of 40 tokens and less, padded to 64; two micro-batches a step, so some are recorded from the second on."""
    folder = tiny.save(tmp_path, arch)
    ours, plain = (Side(folder, knobs, packing=packing, record=r) for r in (record, None))
    for sizes in ((30, 30, 33, 35), (16, 16, 12, 31, 33, 40), (9, 31, 40, 7, 20, 11), (8, 8, 8)) * 2:
        assert_alike(ours, plain, samples(*sizes))
    assert not ours.warnings
    assert sum(recorded) > 3


def test_layers_that_look_back_a_little_get_a_mask(tmp_path: Path, record: Any, recorded: list[int]) -> None:
    folder = tiny.save(tmp_path, "mistral")
    ours, plain = (Side(folder, Lora(rank=4), packing=False, record=r) for r in (record, None))
    for side in (ours, plain):
        side.model.config.sliding_window = 8
        for layer in side.model.model.layers:
            layer.self_attn.sliding_window = 8
    for _ in range(3):
        assert_alike(ours, plain, samples(30, 40))
    assert not ours.warnings
    assert sum(recorded)


def test_a_slot_that_grows_is_recorded_anew(tmp_path: Path, record: Any, recorded: list[int]) -> None:
    """And with it all others: their tensors may have moved, too."""
    folder = tiny.save(tmp_path)
    ours, plain = (Side(folder, Lora(rank=4), Lora(rank=2), packing=False, record=r, rows=1) for r in (record, None))
    own = samples(30, 31, 32), samples(20, 21, 22)
    for _ in range(2):
        assert_alike(ours, plain, *own)
    assert recorded == [1 + 4] * 2  # for each slot a look, and what of six passes came third and later
    for side in (ours, plain):
        side.bank.resize(0, Lora(rank=8))
        side.trials = side.start()
    for _ in range(2):
        assert_alike(ours, plain, *own)
    assert recorded == [1 + 4] * 4
    assert not ours.warnings


def test_what_may_not_be_recorded_is_not(tmp_path: Path, record: Any, recorded: list[int]) -> None:
    folder = tiny.save(tmp_path)
    dropout = Side(folder, Lora(rank=4, dropout=0.1), record=record)
    mixed = Side(folder, Lora(rank=4), Lora(rank=2), record=record, packing=False)
    for _ in range(4):
        dropout.step(samples(30, 40))
        mixed.step(samples(40), samples(40))
    assert not recorded


@pytest.mark.parametrize("fault", ["raises", "stale", "no gradient"])
def test_a_recording_that_fails_is_told_and_not_used(fault: str, tmp_path: Path) -> None:
    def broken(work: Any) -> Any:
        work()
        if fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        if fault == "stale":
            return lambda: None

        def forward_alone() -> None:
            kept = [leaf.grad.clone() for leaf in ours.bank.leaves().values()]
            work()
            for leaf, grad in zip(ours.bank.leaves().values(), kept, strict=True):
                leaf.grad.copy_(grad)

        return forward_alone

    folder = tiny.save(tmp_path)
    ours, plain = (Side(folder, Lora(rank=4), record=r) for r in (broken, None))
    for _ in range(4):
        assert_alike(ours, plain, samples(30, 40))
    assert len(ours.warnings) == 1
    assert "small passes take longer" in ours.warnings[0]
