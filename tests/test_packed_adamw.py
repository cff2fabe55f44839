"""AdamW on the stacked tensors against torch's own, slot by slot."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import IA3, BitFit, Bottleneck, Lora, Sparse, Train, Zero
from orchestrator.errors import CheckpointError
from orchestrator.methods import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.packed_adamw import PackedAdamW
from orchestrator.train.schedule import lr_at
from orchestrator.train.trial import PATIENCE, Trial
from tests import tiny
from tests.methods_kit import bank_of, loaded

KNOBS: dict[int, Any] = {
    1: Lora(rank=2, alpha=4),
    2: Lora(rank=5, alpha=4, targets=("q_proj", "down_proj"), lr_ratio=8.0),
    3: Bottleneck(size=3),
    4: Sparse(density=0.01, rechoose_every=2, rechoose_share=0.5),
    5: IA3(),
    6: BitFit(),
    7: Bottleneck(size=6, placement="houlsby"),
}
TRAINS = {
    1: Train(lr=0.02, warmup=0.0),
    2: Train(lr=0.05, schedule="linear", clip=0.5, beta1=0.8),
    3: Train(lr=0.01, weight_decay=0.3, beta2=0.95),
    4: Train(lr=0.03, schedule="constant", eps=1e-3),
    5: Train(lr=0.02, clip=0.0, min_lr=0.2),
    6: Train(lr=0.1, warmup=0.3),
    7: Train(lr=0.01, clip=1e-3),
}
TOTAL = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


class Torch:
    """One slot's parameters, cloned, with torch's own optimizer around them."""

    def __init__(self, bank: Bank, slot: int) -> None:
        self.train, self.ratios = TRAINS[slot], bank.lr_ratios(slot)
        self.values = {n: torch.nn.Parameter(p.detach().clone()) for n, p in bank.parameters(slot).items()}
        t = self.train
        self.adamw = torch.optim.AdamW(
            [{"params": [p], "name": n} for n, p in self.values.items()],
            lr=1.0,
            betas=(t.beta1, t.beta2),
            eps=t.eps,
            weight_decay=t.weight_decay,
        )
        self.taken = 0

    def step(self, grads: dict[str, torch.Tensor]) -> None:
        for name, value in self.values.items():
            value.grad = grads[name].clone()
        lr = lr_at(self.train, self.taken, TOTAL)
        self.taken += 1
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        if not norm.isfinite():
            return
        if self.train.clip:
            torch.nn.utils.clip_grad_norm_(self.values.values(), self.train.clip)
        for group in self.adamw.param_groups:
            group["lr"] = lr * self.ratios[group["name"]]
        self.adamw.step()


def fill(bank: Bank, slot: int) -> None:
    bank.add(slot, KNOBS[slot], seed=slot)


def give(bank: Bank, step: int, spoilt: int | None = None) -> dict[int, dict[str, torch.Tensor]]:
    """Random gradients in the leaves, also where a slot has padding; what of them is each slot's."""
    bank.zero_grad()
    draw = torch.Generator().manual_seed(step)
    for leaf in bank.leaves().values():
        leaf.grad = torch.randn(leaf.shape, generator=draw) * 0.3
    bank.hand_out_gradients()
    if spoilt is not None:
        next(iter(bank.parameters(spoilt).values())).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
    return {s: {n: p.grad.clone() for n, p in bank.parameters(s).items()} for s in bank.slots}  # type: ignore[union-attr]


def check(bank: Bank, slot: int, truth: Torch) -> None:
    for name, value in bank.parameters(slot).items():
        torch.testing.assert_close(value.detach(), truth.values[name].detach(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("spoilt", [None, 3])
def test_slots_that_come_and_go_step_as_torch_steps_each_alone(base: Path, spoilt: int | None) -> None:
    bank = bank_of(loaded(base, "none"))
    packed, truth = PackedAdamW(bank), {}

    def join(slot: int) -> None:
        fill(bank, slot)
        packed.join(slot, TRAINS[slot], TOTAL)
        truth[slot] = Torch(bank, slot)

    def leave(slot: int) -> None:
        packed.leave(slot)
        bank.remove(slot)
        del truth[slot]

    for slot in (1, 2, 3, 5):
        join(slot)
    padding: dict[str, torch.Tensor] = {}
    for step in range(8):
        if step == 2:
            join(6)
            join(7)
        if step == 4:
            leave(1)
            leave(5)
        if step == 5:
            join(1)  # the same number, another trial
        grads = give(bank, step, spoilt if step in (3, 6) and spoilt in truth else None)
        padding = {n: leaf.detach().clone() for n, leaf in bank.leaves().items()}
        told = packed.step()
        for slot, own in truth.items():
            own.step(grads[slot])
            check(bank, slot, own)
            assert told[slot]["lr"] == pytest.approx(
                0.0 if spoilt == slot and step in (3, 6) else lr_at(own.train, own.taken - 1, TOTAL)
            )
    if spoilt is not None:
        assert packed.courses[spoilt].bad_steps == 2
    assert padding, "something was stepped"
    for stack, _ in bank.stacks():
        outside = torch.ones_like(stack.leaf, dtype=torch.bool)  # type: ignore[arg-type]
        for slot in stack.order:
            part = outside[stack.order.index(slot)]
            for dim, size in enumerate(stack.value(slot).shape):
                part = part.narrow(dim, 0, size)
            part.fill_(False)
        assert not stack.leaf.detach()[outside].any(), "padding moved"  # type: ignore[index]


def test_sparse_slots_choose_anew_as_in_a_run_of_their_own(base: Path) -> None:
    bank, alone = bank_of(loaded(base, "none")), bank_of(loaded(base, "none"))
    packed = PackedAdamW(bank)
    for slot in (3, 4, 1):
        fill(bank, slot)
        packed.join(slot, TRAINS[slot], TOTAL)
    fill(alone, 4)
    engine = Engine(Zero(), stage=0, device=torch.device("cpu"), dtype=torch.float32)
    trial = Trial(alone, engine, 4, TRAINS[4], TOTAL)
    before = bank.tensors(4)
    for step in range(5):
        grads = give(bank, step)[4]
        for name, parameter in alone.parameters(4).items():
            parameter.grad = grads[name].clone()
        packed.step()
        trial.update()
    for name, value in bank.tensors(4).items():
        torch.testing.assert_close(value, alone.tensors(4)[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(v, before[n]) for n, v in bank.tensors(4).items() if n.endswith("index"))


@pytest.mark.parametrize("slot", [2, 3])
def test_state_goes_to_a_run_of_its_own_and_back(base: Path, slot: int) -> None:
    bank, alone, third = (bank_of(loaded(base, "none")) for _ in range(3))
    packed, truth = PackedAdamW(bank), None
    for s in (1, slot):
        fill(bank, s)
        packed.join(s, TRAINS[s], TOTAL)
    truth = Torch(bank, slot)

    def both(step: int) -> dict[str, torch.Tensor]:
        grads = give(bank, step)[slot]
        truth.step(grads)
        return grads

    for step in range(3):
        both(step)
        packed.step()
    values, tensors = packed.state(slot)
    assert values == {"step": 3, "bad_steps": 0, "bad_in_row": 0, "total": TOTAL}
    engine = Engine(Zero(), stage=0, device=torch.device("cpu"), dtype=torch.float32)
    alone.add(0, KNOBS[slot], tensors=bank.tensors(slot))
    trial = Trial(alone, engine, 0, TRAINS[slot], TOTAL)
    trial.load_state(values, tensors)
    for step in range(3, 5):
        grads = both(step)
        for name, parameter in alone.parameters(0).items():
            parameter.grad = grads[name].clone()
        trial.update()
    check(alone, 0, truth)
    again = PackedAdamW(third)
    third.add(9, KNOBS[1], seed=1)
    third.add(4, KNOBS[slot], tensors=alone.tensors(0))
    again.join(9, TRAINS[1], TOTAL)
    again.join(4, TRAINS[slot], TOTAL)
    again.load_state(4, *trial.state())
    for step in range(5, 7):
        grads = both(step)
        third.zero_grad()
        for leaf in third.leaves().values():
            leaf.grad = torch.zeros_like(leaf)
        third.hand_out_gradients()
        for name, parameter in third.parameters(4).items():
            parameter.grad.copy_(grads[name])  # type: ignore[union-attr]
        again.step()
    check(third, 4, truth)
    with pytest.raises(CheckpointError, match="another method, rank or base"):
        again.load_state(9, *trial.state())


def test_moments_survive_a_resize(base: Path) -> None:
    bank = bank_of(loaded(base, "none"))
    packed = PackedAdamW(bank)
    for slot in (1, 2):
        fill(bank, slot)
        packed.join(slot, TRAINS[slot], TOTAL)
    give(bank, 0)
    packed.step()
    _, before = packed.state(1)
    _, other = packed.state(2)
    bank.resize(1, KNOBS[1].model_copy(update={"rank": 7}))
    _, after = packed.state(1)
    for name, value in before.items():
        window = after[name][tuple(slice(size) for size in value.shape)]
        torch.testing.assert_close(window, value, rtol=0, atol=0)
        assert after[name].numel() > value.numel()
        assert after[name].count_nonzero() == value.count_nonzero()
    assert all(torch.equal(value, other[name]) for name, value in packed.state(2)[1].items())


def test_a_slot_without_patience_says_so(base: Path) -> None:
    bank = bank_of(loaded(base, "none"))
    packed = PackedAdamW(bank)
    for slot in (1, 3):
        fill(bank, slot)
        packed.join(slot, TRAINS[slot], TOTAL)
    for step in range(PATIENCE):
        assert packed.courses[3].trouble is None
        give(bank, step, spoilt=3)
        packed.step()
    assert "5 times in a row, up to step 5" in str(packed.courses[3].trouble)
    assert packed.courses[1].trouble is None
