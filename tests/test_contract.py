"""What every method promises: each case of ``methods_kit.CASES`` on a dense, an NF4 and an int8 base."""

import gc
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.base import dense_weight
from orchestrator.base.linear import dense_parameters, linear_sites
from orchestrator.config import CausalLM, Train, Zero
from orchestrator.data import Sample
from orchestrator.delta import load_delta, save_delta
from orchestrator.methods import from_files, method_of, to_files
from orchestrator.train.engine import Engine
from orchestrator.train.loss import plain_loss
from orchestrator.train.step import Layout, Stepper
from orchestrator.train.trial import Trial
from tests import tiny
from tests.methods_kit import (
    CASES,
    NO_WEIGHT_CHANGE,
    TOKENS_BT,
    TRAINED,
    bank_of,
    forward,
    loaded,
    mixed,
    own,
    packable,
    shake,
)

HELD = ["none", "nf4", "int8"]
DENSE = {"last_layers", "last_layers_head"}
"""Cases whose change is as large as the weight; a run holds those layers unquantized."""


def pairs() -> list[Any]:
    return [pytest.param(name, q, id=f"{name}-{q}") for name in CASES for q in HELD if name != "full" or q == "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("case", "quantize"), pairs())
def test_an_untrained_delta_is_the_base_and_training_moves_it_alone(case: str, quantize: str, folder: Path) -> None:
    model, knobs = loaded(folder, quantize), CASES[case]
    plain, before = forward(model, None, [-1] * 4), fingerprint(model)
    bank = bank_of(model)
    bank.add(0, knobs, seed=3)
    started = forward(model, bank, [0] * 4)
    if method_of(knobs).starts_as_base(knobs):
        torch.testing.assert_close(started, plain, rtol=1e-5, atol=1e-5)
    else:
        assert (started - plain).abs().max() > 1e-4
    engine = Engine(Zero(stage=0), stage=0, device=torch.device("cpu"), dtype=torch.float32)
    stepper = Stepper(model, bank, engine, plain_loss, Layout(length=32, rows_per_pass=2, packing=True, pad_id=0))
    trial = Trial(bank, engine, 0, Train(lr=0.05, warmup=0.0, clip=0), total=8)
    assert sum(p.numel() for p in bank.parameters(0).values()) == TRAINED[case]
    values = {name: t.clone() for name, t in bank.windows(0).items()}
    samples = [Sample(row.tolist(), [True] * len(row), key) for key, row in enumerate(TOKENS_BT)]
    losses = []
    for step in range(3):
        losses.append(stepper.train({0: samples}, {0: step})[0])
        trial.update()
    assert losses[-1] < losses[0]
    assert fingerprint(model) == before, "the base moved"
    for name, t in bank.windows(0).items():
        part = bank.parameters(0).get(name)
        moved = t != values[name]
        assert moved.sum() <= (part.numel() if part is not None else 0), f"{name}: what is not trained moved"
    bank.detach()
    torch.testing.assert_close(forward(model, None, [-1] * 4), plain, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("case", "quantize"), pairs())
def test_a_fresh_base_and_the_saved_delta_give_the_same(case: str, quantize: str, folder: Path, tmp_path: Path) -> None:
    model, knobs = loaded(folder, quantize), CASES[case]
    bank = bank_of(model)
    bank.add(0, knobs, seed=3)
    shake(bank, 0)
    expected = forward(model, bank, [0] * 4)
    files, config = to_files(knobs, CausalLM(), bank.tensors(0), bank.sites(0), bank.scope)
    save_delta(tmp_path / "delta", files, None, config)
    fresh = loaded(folder, quantize)
    other = bank_of(fresh)
    other.add(5, knobs, seed=9, tensors=from_files(knobs, None, load_delta(tmp_path / "delta").tensors, other.scope))
    torch.testing.assert_close(forward(fresh, other, [5] * 4), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("case", "quantize"), pairs())
def test_merging_into_the_dequantized_base_changes_nothing(case: str, quantize: str, folder: Path) -> None:
    model, knobs = loaded(folder, quantize), CASES[case]
    method = method_of(knobs)
    bank = bank_of(model)
    bank.add(0, knobs, seed=3)
    shake(bank, 0, size=0.05)
    expected, tensors = forward(model, bank, [0] * 4), bank.tensors(0)
    dense = loaded(folder, "none")
    for name, module in linear_sites(dense):
        if name in bank.scope.linears:
            module.weight.data = dense_weight(model.get_submodule(name))
    borrowed = method.shared(knobs, bank.scope)
    for site in [s for s in bank.sites(0) if s not in borrowed]:
        module = dense.get_submodule(site)
        base = dense_parameters(module)
        change = method.weight_change(knobs, site, own(tensors, site), base)
        if case in NO_WEIGHT_CHANGE:
            assert change is None
            return
        assert change
        for name, value in change.items():
            setattr(module, name, nn.Parameter(base.get(name, torch.zeros_like(value)) + value, requires_grad=False))
    assert case not in NO_WEIGHT_CHANGE
    torch.testing.assert_close(forward(dense, None, [-1] * 4), expected, rtol=1e-4, atol=1e-4)
    assert (expected - forward(model, None, [-1] * 4)).abs().max() > 1e-2, "the delta does nothing"


@pytest.mark.parametrize("quantize", HELD)
def test_all_slots_at_once_equal_each_alone(quantize: str, folder: Path) -> None:
    """Forward and backward, every packable case and the bare base in one batch."""
    cases = mixed()
    model = loaded(folder, quantize)
    bank = bank_of(model)
    for slot, knobs in enumerate(cases):
        bank.add(slot, knobs, seed=slot)
        shake(bank, slot, slot)
    rows = [*range(len(cases)), -1]
    tokens_BT = torch.randint(3, tiny.VOCAB, (len(rows), 16), generator=torch.Generator().manual_seed(7))
    together = forward(model, bank, rows, tokens_BT)
    together.square().mean((1, 2)).sum().backward()
    bank.hand_out_gradients()
    alone = loaded(folder, quantize)
    for row, slot in enumerate(rows):
        solo = bank_of(alone)
        if slot >= 0:
            solo.add(0, cases[slot], tensors=bank.tensors(slot))
        logits = forward(alone, solo, [0 if slot >= 0 else -1], tokens_BT[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], logits, rtol=1e-4, atol=1e-5)
        if slot >= 0:
            logits.square().mean().backward()
            solo.hand_out_gradients()
            for name, parameter in solo.parameters(0).items():
                torch.testing.assert_close(bank.parameters(slot)[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)
        solo.detach()
    for some in (rows[::-3] + rows[1:3], [0, 2], [1, 4]):  # in another order, with some slots absent
        logits = forward(model, bank, some, tokens_BT[some])
        torch.testing.assert_close(logits, together[some], rtol=1e-4, atol=1e-5)


def test_a_slot_of_nan_stays_alone(folder: Path) -> None:
    """Each case in turn is broken; every other row, and every other slot's gradient, stays as it was."""
    cases = mixed()
    model = loaded(folder, "none")
    bank = bank_of(model)
    for slot, knobs in enumerate(cases):
        bank.add(slot, knobs, seed=slot)
        shake(bank, slot, slot)
    rows = [*range(len(cases)), -1, 0, 0]  # most of the first slot: groups of the others are filled up
    tokens_BT = torch.randint(3, tiny.VOCAB, (len(rows), 16), generator=torch.Generator().manual_seed(7))

    def passed() -> tuple[torch.Tensor, dict[int, dict[str, torch.Tensor]]]:
        bank.zero_grad()
        logits = forward(model, bank, rows, tokens_BT)
        logits.square().mean((1, 2)).sum().backward()
        bank.hand_out_gradients()
        found = {slot: {n: p.grad.clone() for n, p in bank.parameters(slot).items()} for slot in range(len(cases))}
        return logits.detach(), found

    before, gradients = passed()
    for slot in range(len(cases)):
        kept = {name: p.data.clone() for name, p in bank.parameters(slot).items()}
        for p in bank.parameters(slot).values():
            p.data.fill_(float("nan"))
        after, moved = passed()
        assert after[slot].isnan().any(), list(packable())[slot]
        others = [row for row, own in enumerate(rows) if own != slot]
        torch.testing.assert_close(after[others], before[others], rtol=1e-5, atol=1e-6)
        for other in set(range(len(cases))) - {slot}:
            torch.testing.assert_close(moved[other], gradients[other], rtol=1e-4, atol=1e-6)
        for name, p in bank.parameters(slot).items():
            p.data.copy_(kept[name])


class Watch(TorchDispatchMode):
    """Counts operations that give floats, and knows which results as large as one of ``weights`` are still there."""

    def __init__(self, model: nn.Module, weights: set[int]) -> None:
        super().__init__()
        self.count, self._weights, self._seen = 0, weights, list[StorageWeakRef]()
        self._own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.numel()]
        self.count += any(t.is_floating_point() for t in tensors)
        for t in tensors:
            if any(t.numel() % n == 0 for n in self._weights) and t.untyped_storage().data_ptr() not in self._own:
                self._seen.append(StorageWeakRef(t.untyped_storage()))
        return out

    def alive(self) -> int:
        """Storages, each once."""
        gc.collect()
        return len({ref.cdata for ref in self._seen if not ref.expired()})


@pytest.mark.parametrize("case", list(packable()))
def test_launches_do_not_grow_with_slots(case: str, folder: Path) -> None:
    """Two and four slots of a method, in the same rows: as many operations, forward and backward.

    Which token is whose is found once a pass, with integers, slot by slot; that is not counted.
    """
    model, counts = loaded(folder, "nf4"), []
    tokens_BT = torch.randint(3, tiny.VOCAB, (5, 16), generator=torch.Generator().manual_seed(7))
    for rows in ([0, 0, 1, 1, -1], [0, 1, 2, 3, -1]):
        bank = bank_of(model)
        for slot in range(max(rows) + 1):
            bank.add(slot, CASES[case], seed=slot)
        forward(model, bank, rows, tokens_BT)  # what is made once
        with Watch(model, set()) as watch:
            forward(model, bank, rows, tokens_BT).square().sum().backward()
        counts.append(watch.count)
        bank.detach()
    assert counts[1] == counts[0] > 0


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("case", list(packable()))
def test_no_dense_copy_of_a_quantized_weight_is_kept(case: str, quantize: str, folder: Path) -> None:
    """Not in the bank, and not from the forward pass to the backward pass."""
    model = loaded(folder, quantize)
    weights = {m.in_features * m.out_features for _, m in linear_sites(model) if not isinstance(m, nn.Linear)}
    tokens_BT = TOKENS_BT[:3, :9]  # no activation has a multiple of these sizes
    plain = Watch(model, weights)
    with plain:
        logits = forward(model, None, [-1] * 3, tokens_BT.clone())
    assert plain.alive() == 0 < len(weights)
    bank = bank_of(model, fuse=quantize == "nf4")
    with Watch(model, weights) as watch:
        bank.add(0, CASES[case], seed=3)
        logits = forward(model, bank, [0] * 3, tokens_BT)
    assert logits.requires_grad
    assert (watch.alive() > 0) == (case in DENSE)
