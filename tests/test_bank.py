"""The bank and LoRA against peft's own implementation, and the promises every method keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from orchestrator.base import load_base
from orchestrator.base.linear import dense_weight
from orchestrator.config import Base, Lora
from orchestrator.errors import DeltaError, MethodError
from orchestrator.methods import METHODS, Bank, Scope
from orchestrator.methods.drop import Drop, mix
from tests import tiny

TOKENS_BT = torch.randint(3, tiny.VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))
KNOBS = [
    Lora(rank=4, alpha=8),
    Lora(rank=8, alpha=4, rslora=True, targets=("q_proj", "v_proj")),
    Lora(rank=2, alpha=16, targets=("down_proj", r".*layers\.1\.self_attn\..*")),
    Lora(rank=16, alpha=16),
]


def forward(model: Any, tokens_BT: torch.Tensor = TOKENS_BT, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=tokens_BT, use_cache=False, **kwargs).logits


def trained(bank: Bank, slot: int, seed: int = 0) -> None:
    """Give a slot values that change something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters(slot).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2


def base_of(folder: Path, quantize: str) -> Any:
    return load_base(Base(id=str(folder), quantize=quantize)).model


def with_peft(folder: Path, bank: Bank, slot: int) -> Any:
    """The same delta in peft's own model."""
    config = METHODS["lora"].to_peft(bank.knobs(slot), bank.sites(slot), bank.scope)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(**{**config, "inference_mode": False}),
    )
    state = {f"base_model.model.{n.replace('.weight', '.default.weight')}": t for n, t in bank.tensors(slot).items()}
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert sum("lora" in n for n, _ in model.named_parameters()) == len(state)
    return model.eval()


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_an_untrained_slot_is_the_base(quantize: str, tmp_path: Path) -> None:
    model = base_of(tiny.save(tmp_path), quantize)
    plain = forward(model)
    bank = Bank(model)
    for slot, knobs in enumerate(KNOBS):
        bank.add(slot, knobs)
        with bank.routed(torch.full_like(TOKENS_BT, slot)):
            assert torch.equal(forward(model), plain)


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_logits_and_gradients_equal_pefts(arch: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, arch)
    model = base_of(folder, "none")
    bank = Bank(model, base_id=str(folder))
    bank.add(0, KNOBS[0], seed=5)
    trained(bank, 0)
    peft = with_peft(folder, bank, 0)
    with bank.routed(torch.zeros_like(TOKENS_BT)):
        ours = forward(model)
        ours.square().mean().backward()
    theirs = forward(peft)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    theirs.square().mean().backward()
    bank.hand_out_gradients()
    grads = {n: p.grad for n, p in peft.named_parameters() if p.grad is not None}
    for name, parameter in bank.parameters(0).items():
        expected = grads[f"base_model.model.{name.replace('.weight', '.default.weight')}"]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_slots_at_once_equal_each_alone(quantize: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    mixed = base_of(folder, quantize)
    bank = Bank(mixed)
    for slot, knobs in enumerate(KNOBS):
        bank.add(slot, knobs, seed=slot)
        trained(bank, slot, slot)
    # Slots in no order, of unequal counts, and some for the bare base.
    slot_BT = torch.tensor([2, 0, -1, 3]).unsqueeze(1).expand(4, 16)
    with bank.routed(slot_BT):
        together = forward(mixed)
    for row, slot in enumerate([2, 0, -1, 3]):
        alone = base_of(folder, quantize)
        if slot >= 0:
            solo = Bank(alone)
            solo.add(0, bank.knobs(slot), tensors=bank.tensors(slot))
            with solo.routed(torch.zeros(1, 16, dtype=torch.long)):
                expected = forward(alone, TOKENS_BT[row : row + 1])
        else:
            expected = forward(alone, TOKENS_BT[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_a_slot_of_nan_stays_alone(tmp_path: Path) -> None:
    model = base_of(tiny.save(tmp_path), "none")
    bank = Bank(model)
    for slot in (0, 1):
        bank.add(slot, KNOBS[slot], seed=slot)
        trained(bank, slot, slot)
    slot_BT = torch.tensor([0, 1, 0, -1]).unsqueeze(1).expand(4, 16)

    def run() -> tuple[torch.Tensor, dict[str, Any]]:
        bank.zero_grad()
        with bank.routed(slot_BT):
            logits = forward(model)
            torch.where(logits.isfinite(), logits, 0).square().mean().backward()
        bank.hand_out_gradients()
        return logits, {n: p.grad.clone() for n, p in bank.parameters(1).items()}

    before, grads = run()
    for parameter in bank.parameters(0).values():
        parameter.data.fill_(float("nan"))
    after, grads_after = run()
    assert after[0].isnan().all()
    torch.testing.assert_close(after[[1, 3]], before[[1, 3]], rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_after[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_merging_changes_nothing(arch: str, quantize: str, tmp_path: Path) -> None:
    model = base_of(tiny.save(tmp_path, arch), quantize)
    bank = Bank(model)
    bank.add(0, Lora(rank=4), seed=1)
    trained(bank, 0)
    with bank.routed(torch.zeros_like(TOKENS_BT)):
        expected = forward(model)
    tensors = bank.tensors(0)
    merged = {}
    for site in bank.sites(0):
        own = {n.removeprefix(f"{site}."): t for n, t in tensors.items() if n.startswith(f"{site}.")}
        weight = dense_weight(model.get_submodule(site))
        merged[site] = weight + METHODS["lora"].weight_change(bank.knobs(0), site, own, {"weight": weight})["weight"]
    bank.detach()
    for site, weight in merged.items():
        old = model.get_submodule(site)
        new = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None)
        new.weight.data = weight
        if old.bias is not None:
            new.bias = old.bias
        model.set_submodule(site, new)
    torch.testing.assert_close(forward(model), expected, rtol=1e-4, atol=1e-4)


def test_slots_come_go_and_grow(tmp_path: Path) -> None:
    model = base_of(tiny.save(tmp_path), "none")
    plain = forward(model)
    bank = Bank(model)
    bank.add(0, KNOBS[0])
    trained(bank, 0)
    handles = bank.parameters(0)

    def zero() -> torch.Tensor:
        with bank.routed(torch.zeros_like(TOKENS_BT)):
            return forward(model)

    before = zero()
    bank.add(7, KNOBS[3])
    bank.resize(0, Lora(rank=9, alpha=8))
    torch.testing.assert_close(zero(), before, rtol=1e-5, atol=1e-5)
    assert all(bank.parameters(0)[n] is p for n, p in handles.items())
    assert all(9 in p.shape for p in handles.values())
    bank.resize(0, KNOBS[0])
    torch.testing.assert_close(zero(), before, rtol=1e-3, atol=1e-3)
    bank.remove(7)
    torch.testing.assert_close(zero(), before, rtol=1e-3, atol=1e-3)
    bank.detach()
    assert torch.equal(forward(model), plain)
    assert not any(m._forward_hooks for m in model.modules())


def test_dropout_of_a_token_does_not_depend_on_its_company(tmp_path: Path) -> None:
    model = base_of(tiny.save(tmp_path), "none")
    bank = Bank(model)
    bank.add(0, Lora(rank=4, dropout=0.5), seed=3)
    trained(bank, 0)
    position_BT = torch.arange(16).expand(4, 16)
    sample_BT = torch.tensor([5, 9, 2, 7]).unsqueeze(1).expand(4, 16)

    def run(rows: list[int], step: int) -> torch.Tensor:
        route = {"position_BT": position_BT[rows], "sample_BT": sample_BT[rows], "steps": {0: step}}
        with bank.routed(torch.zeros(len(rows), 16, dtype=torch.long), **route):
            return forward(model, TOKENS_BT[rows])

    torch.testing.assert_close(run([2], 1)[0], run([0, 1, 2, 3], 1)[2], rtol=1e-5, atol=1e-5)
    assert (run([2], 1) - run([2], 2)).abs().max() > 1e-2


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    x_GMI = torch.rand(2, 1000, 64) + 1
    dropped = Drop(torch.tensor([0.1, 0.5]), mix(torch.arange(2000).view(2, 1000)))(x_GMI)
    assert ((dropped == 0).float().mean((1, 2)) - torch.tensor([0.1, 0.5])).abs().max() < 0.01
    assert ((dropped.mean((1, 2)) / x_GMI.mean((1, 2))) - 1).abs().max() < 0.02
    for dim in (1, 2):  # no row and no column is dropped as a whole
        assert ((dropped[1] == 0).float().mean(dim - 1) - 0.5).abs().max() < 0.35


@pytest.mark.parametrize("target", ["q_porj", "layers.9.self_attn.q_proj"])
def test_a_target_without_match_names_the_nearest(target: str, tmp_path: Path) -> None:
    bank = Bank(base_of(tiny.save(tmp_path), "none"))
    with pytest.raises(MethodError, match="nearest is 'q_proj'"):
        bank.add(0, Lora(targets=("up_proj", target)))
    assert bank.slots == ()


def test_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    bank = Bank(base_of(tiny.save(tmp_path), "none"))
    bank.add(0, KNOBS[0])
    with pytest.raises(DeltaError, match="shape"):
        bank.add(1, KNOBS[3], tensors=bank.tensors(0))
    with pytest.raises(DeltaError, match="is missing"):
        bank.add(1, KNOBS[0], tensors={})


def test_config_of_peft_comes_back(tmp_path: Path) -> None:
    scope = Scope.of(base_of(tiny.save(tmp_path), "none"))
    lora = METHODS["lora"]
    for knobs in KNOBS:
        sites = list(lora.sites(knobs, scope))
        back = lora.from_peft(LoraConfig(**lora.to_peft(knobs, sites, scope)).to_dict())
        assert list(lora.sites(back, scope)) == sites
        assert (back.rank, lora.numbers(back, sites[0])) == (knobs.rank, lora.numbers(knobs, sites[0]))
    with pytest.raises(MethodError, match="a bias in B"):
        lora.from_peft(LoraConfig(lora_bias=True, target_modules=["q_proj"]).to_dict())
