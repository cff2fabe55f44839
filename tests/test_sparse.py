"""sparse: its products, its choices, and what it does to training."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.base.linear import dense_weight
from orchestrator.config import CausalLM, Lora, Sparse, Train, Zero
from orchestrator.data import Sample
from orchestrator.errors import DeltaError, MethodError, OutOfMemoryError
from orchestrator.methods import Bank, Scope, from_files
from orchestrator.methods.sparse_ops import SparseLinear, drawn, largest
from orchestrator.train import fisher as fisher_module
from orchestrator.train.engine import Engine
from orchestrator.train.fisher import fisher
from orchestrator.train.loss import plain_loss
from orchestrator.train.trial import Trial
from tests import tiny
from tests.launch_kit import assert_same_bits, small, train_here, weights
from tests.method_kit import TOKENS_BT, banked, base_of, forward, gradients, passed
from tests.ranks import run_ranks

RANDOM = Sparse(density=0.05, choose="random")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {arch: tiny.save(folder / arch, arch) for arch in ("llama", "gpt2")}


# ---- the product


def drawn_case(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two slots; the second has fewer entries, filled up with zeros at place 0."""
    generator = torch.Generator().manual_seed(0)
    index_GK = torch.stack([drawn(50, 24 * 40, torch.empty(0), generator) for _ in range(2)])
    values_GK = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    index_GK[1, 0], index_GK[1, 1] = 0, index_GK[1, 2]  # place 0 itself, and a place twice
    index_GK[1, 30:], values_GK[1, 30:] = 0, 0
    return torch.randn(2, tokens, 40, generator=generator, dtype=torch.float64), values_GK, index_GK


@pytest.mark.parametrize("tokens", [2, 30])
def test_the_product_is_that_of_the_dense_matrix(tokens: int) -> None:
    """Few tokens gather entries, many make the matrix dense: the same numbers, and gradients, as plain torch."""
    x, values, index = drawn_case(tokens)
    assert (8 * tokens * 50 <= 24 * 40) == (tokens == 2), "both ways are to be seen"
    mine = [x.float().requires_grad_(), values.float().requires_grad_()]
    y = SparseLinear.apply(*mine, index, 24)
    theirs = [x.clone().requires_grad_(), values.clone().requires_grad_()]
    dense = torch.stack(
        [torch.zeros(960, dtype=torch.float64).index_add(0, i, v) for i, v in zip(index, theirs[1], strict=True)]
    )
    expected = theirs[0] @ dense.view(2, 24, 40).mT
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_nothing_dense_is_kept_between_forward_and_backward() -> None:
    x, values, index = drawn_case(30)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        SparseLinear.apply(x.float().requires_grad_(), values.float().requires_grad_(), index, 24)
    assert kept == [x.shape, values.shape, index.shape]


# ---- the choice


def test_the_largest_weights_are_chosen(bases: dict[str, Path]) -> None:
    for arch, quantize in (("llama", "none"), ("llama", "nf4"), ("gpt2", "none")):
        model = base_of(bases[arch], quantize)
        bank = Bank(model)
        bank.add(0, Sparse(density=0.03))
        for site in bank.sites(0):
            weight = dense_weight(model.get_submodule(site)).abs().flatten()
            index = bank.tensors(0)[f"{site}.index"]
            assert index.dtype == torch.int32
            assert len(index) == round(0.03 * len(weight)) == len(index.unique())
            chosen = torch.zeros(len(weight), dtype=torch.bool).index_fill(0, index.long(), True)
            assert weight[chosen].min() >= weight[~chosen].max()
        assert {n.rsplit(".", 1)[-1] for n in bank.parameters(0)} == {"values"}


def test_drawn_places_are_fresh_and_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    taken = torch.arange(0, 100, 2, dtype=torch.int32)
    for total, count in ((1000, 30), (120, 60), (100, 50)):
        found = drawn(count, total, taken, generator)
        assert len(found.unique()) == count
        assert not torch.isin(found, taken).any()
        assert found.max() < total
    counts = torch.zeros(100)
    for _ in range(2000):
        counts[drawn(5, 100, taken[:10], generator).long()] += 1
    assert counts[taken[:10].long()].sum() == 0
    left = counts[counts > 0]
    assert len(left) == 90
    assert (left / left.mean() - 1).abs().max() < 0.4  # a standard deviation is 0.1
    assert drawn(20, 1000, taken, torch.Generator().manual_seed(7)).tolist() == (
        drawn(20, 1000, taken, torch.Generator().manual_seed(7)).tolist()
    )
    assert largest(torch.tensor([[1.0, 9.0], [5.0, 7.0]]), 2).tolist() == [1, 3]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gradients_are_those_of_the_weights_themselves(arch: str, bases: dict[str, Path]) -> None:
    model, bank = banked(bases[arch], RANDOM)
    logits, grads = gradients(model, bank)
    plain = AutoModelForCausalLM.from_pretrained(bases[arch], dtype=torch.float32)
    for site in bank.sites(0):
        flat = in_order(plain, site).detach().reshape(-1).clone()
        tensors = bank.tensors(0)
        flat[tensors[f"{site}.index"].long()] += tensors[f"{site}.values"]
        in_order(plain, site).data.copy_(flat.view(in_order(plain, site).shape))
    theirs = forward(plain)
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-4)
    theirs.square().mean().backward()
    for site in bank.sites(0):
        weight = plain.get_submodule(site).weight
        grad = (weight.grad.T if arch == "gpt2" else weight.grad).reshape(-1)
        expected = grad[bank.tensors(0)[f"{site}.index"].long()]
        torch.testing.assert_close(grads[f"{site}.values"], expected, rtol=1e-3, atol=1e-6)


def in_order(model: Any, site: str) -> torch.Tensor:
    """A weight as [O, I]; a view."""
    module = model.get_submodule(site)
    return module.weight if isinstance(module, torch.nn.Linear) else module.weight.data.T


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_shira_of_peft_computes_the_same_at_the_same_places(bases: dict[str, Path]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32)
    theirs = peft.get_peft_model(plain, peft.ShiraConfig(r=1, target_modules=["q_proj", "o_proj"]))
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, module in theirs.named_modules():
        if hasattr(module, "shira_indices"):
            site, places = name.removeprefix("base_model.model."), module.shira_indices["default"].long()
            module.shira_weight["default"].data = torch.randn(places.shape[1], generator=generator) * 0.2
            tensors[f"{site}.values"] = module.shira_weight["default"].data
            tensors[f"{site}.index"] = (places[0] * module.in_features + places[1]).int()
    model = base_of(bases["llama"])
    bank = Bank(model)
    bank.add(0, Sparse(targets=("q_proj", "o_proj"), density=(64 + 64) / (64 * 64)), tensors=tensors)
    ours = passed(model, bank)
    torch.testing.assert_close(ours, forward(theirs), rtol=1e-4, atol=1e-5)
    bank.detach()
    assert (ours - forward(model)).abs().max() > 0.05


def test_places_outside_of_the_matrix_are_refused(bases: dict[str, Path]) -> None:
    _, bank = banked(bases["llama"], RANDOM)
    tensors, name = bank.tensors(0), "model.layers.0.mlp.up_proj.index"
    for wrong in (-1, 128 * 64):
        broken = {**tensors, name: tensors[name].clone()}
        broken[name][3] = wrong
        with pytest.raises(DeltaError, match=r"up_proj.index is no list of places among the 8,192 weights"):
            from_files(RANDOM, CausalLM(), broken, bank.scope)
    with pytest.raises(DeltaError, match="no list of places"):
        from_files(RANDOM, CausalLM(), {**tensors, name: tensors[name].float()}, bank.scope)


# ---- Fisher information


class Few:
    """A source of five samples."""

    def __init__(self) -> None:
        self.at = 2

    def take(self, n: int) -> list[Sample]:
        found = [
            Sample(TOKENS_BT[i, : 6 + i].tolist(), [j > i for j in range(6 + i)]) for i in range(self.at, self.at + n)
        ]
        self.at += n
        return found

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def engine() -> Engine:
    return Engine(Zero(), stage=0, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_fisher_information_is_the_mean_square_of_samples_gradients(arch: str, bases: dict[str, Path]) -> None:
    model = base_of(bases[arch])
    scope, source = Scope.of(model), Few()
    found = fisher(model, engine(), plain_loss, source, sites=list(scope.linears), scope=scope, count=3)
    assert source.at == 2, "the cursor stays"
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    plain = AutoModelForCausalLM.from_pretrained(bases[arch], dtype=torch.float32)
    squares = {site: torch.zeros(shape) for site, shape in scope.linears.items()}
    for sample in source.take(3):
        plain.zero_grad()
        tokens = torch.tensor([sample.tokens])
        labels = torch.where(torch.tensor([sample.trained]), tokens, -100)
        plain(input_ids=tokens, labels=labels).loss.backward()
        for site, square in squares.items():
            grad = plain.get_submodule(site).weight.grad
            square += (grad.T if arch == "gpt2" else grad) ** 2 / 3
    for site, square in squares.items():
        torch.testing.assert_close(found[site], square, rtol=1e-3, atol=1e-9)
    bank = Bank(model)
    bank.add(0, Sparse(density=0.02, choose="fisher"), importance=found)
    for site, square in squares.items():
        chosen = torch.zeros(square.numel(), dtype=torch.bool)
        chosen[bank.tensors(0)[f"{site}.index"].long()] = True
        assert square.flatten()[chosen].min() >= square.flatten()[~chosen].max() * 0.999


def test_fisher_information_needs_a_run_and_room(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_of(bases["llama"])
    with pytest.raises(MethodError, match="was not measured: a training run does that"):
        Bank(model).add(0, Sparse(choose="fisher"))
    monkeypatch.setattr(fisher_module, "host_memory", lambda: (1 << 30, 1000))
    scope = Scope.of(model)
    with pytest.raises(OutOfMemoryError, match=r"method\.choose=magnitude"):
        fisher(model, engine(), plain_loss, Few(), sites=list(scope.linears), scope=scope, count=3)


# ---- choosing anew


def test_the_least_changed_go_and_the_optimizer_forgets_them(bases: dict[str, Path]) -> None:
    knobs = Sparse(density=0.05, rechoose_every=2, rechoose_share=0.25)
    model = base_of(bases["llama"])
    bank = Bank(model)
    bank.add(3, Lora(rank=2))
    bank.add(0, knobs, seed=1)
    trial = Trial(bank, engine(), 0, Train(lr=0.01, warmup=0.0), total=4)

    def step() -> None:
        bank.zero_grad()
        passed(model, bank).square().mean().backward()
        bank.hand_out_gradients()
        trial.update()

    step()
    after_one = bank.tensors(0)
    step()
    after_two, (_, moments) = bank.tensors(0), trial.state()
    for site in bank.sites(0):
        old, new = after_one[f"{site}.index"], after_two[f"{site}.index"]
        fresh = old != new
        assert int(fresh.sum()) == round(0.25 * len(old))
        assert not torch.isin(new[fresh], old).any(), "drawn among those not chosen"
        assert len(new.unique()) == len(new)
        values = after_two[f"{site}.values"]
        assert not values[fresh].any()
        assert values[~fresh].all()
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = moments[f"{site}.values.{moment}"]
            assert not kept[fresh].any()
            assert kept[~fresh].all()
    step()
    assert all(torch.equal(bank.tensors(0)[n], t) for n, t in after_two.items() if n.endswith("index"))
    step()
    last = bank.tensors(0)
    assert all(last[n].ne(0).all() for n in last if n.endswith("values")), "none is chosen anew after the last step"


def test_what_goes_is_the_least_changed(bases: dict[str, Path]) -> None:
    knobs = Sparse(density=0.05, rechoose_every=1, rechoose_share=0.5)
    _, bank = banked(bases["llama"], knobs)
    before = bank.tensors(0)
    kept = bank.rechoose(0, 1)
    after = bank.tensors(0)
    for site in bank.sites(0):
        values, stays = before[f"{site}.values"].abs(), kept[f"{site}.values"]
        assert values[stays].min() >= values[~stays].max()
        assert torch.equal(after[f"{site}.values"][stays], before[f"{site}.values"][stays])
    full = Sparse(density=1.0, rechoose_every=1, targets="q_proj")
    _, dense = banked(bases["llama"], full)
    assert all(k.all() for k in dense.rechoose(0, 1).values()), "nothing is left to draw"


# ---- training


@pytest.mark.parametrize(
    "options", ["{type: sparse, choose: fisher, fisher_samples: 3}", "{type: sparse, density: 0.05, rechoose_every: 2}"]
)
def test_training_lowers_the_loss_and_resumes_with_the_same_bits(
    options: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    run = small(f"base={bases['llama']}", f"method={options}", "train.lr=0.02", "train.steps=7")
    whole = train_here(run, tmp_path / "whole")
    losses = whole.of("step", "loss")
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.1
    first = train_here(run, tmp_path / "parts", stop_at=3)
    second = train_here(run, tmp_path / "parts")
    assert first.of("step", "loss") + second.of("step", "loss") == losses
    assert whole.latest is not None
    assert second.latest is not None
    assert_same_bits(weights(whole.latest / "delta" / "delta"), weights(second.latest / "delta" / "delta"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_choose_and_train_alike(stage: int, bases: dict[str, Path], tmp_path: Path) -> None:
    """Fisher information over two ranks, on a sharded base too, and places chosen anew: as in one process."""
    options = "{type: sparse, density: 0.02, choose: fisher, fisher_samples: 3, rechoose_every: 2}"
    overrides = [f"base={bases['llama']}", f"method={options}", "train.lr=0.02", "train.steps=5"]
    alone = train_here(small(*overrides), tmp_path / "alone")
    reports = run_ranks("tests.work_script", 2, tmp_path / "ranks", overrides=[*overrides, f"shard={stage}"])
    for report in reports:
        assert report["sent"] == [2**24 + 1, 0.5], "no float stands between an index and its copy"
        torch.testing.assert_close(
            torch.tensor(report["losses"]), torch.tensor(alone.of("step", "loss")), rtol=1e-4, atol=1e-5
        )
    assert reports[0]["digest"] == reports[1]["digest"]
