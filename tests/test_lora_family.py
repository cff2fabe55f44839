"""DoRA, rsLoRA, rank patterns, PiSSA, LoftQ and LoRA+ against peft's own implementations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils import loftq_utils
from transformers import AutoModelForCausalLM

from orchestrator.base import NF4Linear, load_base
from orchestrator.base.linear import Linear, dense_weight, is_transposed
from orchestrator.config import Base, CausalLM, Lora, Train, Zero
from orchestrator.delta import load_delta, save_delta
from orchestrator.errors import MethodError
from orchestrator.methods import Bank, from_files, knobs_from_peft, method_of, to_files
from orchestrator.train.engine import Engine
from orchestrator.train.trial import Trial
from tests import tiny

TOKENS_BT = torch.randint(3, tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
MIXED = [
    Lora(rank=4, alpha=8),
    Lora(rank=3, alpha=6, dora=True),
    Lora(rank=2, alpha=4, start="pissa"),
    Lora(rank=6, alpha=9, dora=True, rslora=True, targets=("q_proj", "down_proj")),
    Lora(rank=2, alpha=4, ranks={"v_proj": 5}, alphas={r".*layers\.0\..*": 7}),
]


def base_of(folder: Path, quantize: str = "none") -> Any:
    return load_base(Base(id=str(folder), quantize=quantize))


def bank_of(folder: Path, quantize: str = "none") -> tuple[Any, Bank]:
    base = base_of(folder, quantize)
    return base.model, Bank(base.model, base_id=str(folder), source=base.source)


def forward(model: Any, bank: Bank | None = None, slots: list[int] | None = None) -> torch.Tensor:
    if bank is None:
        return model(input_ids=TOKENS_BT, use_cache=False).logits
    with bank.routed(torch.tensor(slots or [0, 0]).unsqueeze(1).expand(TOKENS_BT.shape)):
        return forward(model)


def shaken(bank: Bank, slot: int = 0) -> None:
    """Values that change something."""
    generator = torch.Generator().manual_seed(slot)
    for parameter in bank.parameters(slot).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dense(folder: Path) -> Any:
    """transformers' own model with the weights that the NF4 base computes with."""
    held, model = base_of(folder, "nf4").model, plain(folder)
    for name, module in held.named_modules():
        if isinstance(module, NF4Linear):
            weight_OI = dense_weight(module)
            twin = model.get_submodule(name)
            twin.weight.data = weight_OI.T.contiguous() if is_transposed(twin) else weight_OI
    return model


def save(bank: Bank, out: Path) -> Path:
    """Slot 0 as a folder."""
    files, config = to_files(bank.knobs(0), CausalLM(), bank.tensors(0), bank.sites(0), bank.scope)
    return save_delta(out, files, None, config).path


def gradients(peft: Any) -> dict[str, torch.Tensor]:
    """As our parameters are named."""
    named = {n.removeprefix("base_model.model."): p.grad for n, p in peft.named_parameters() if p.grad is not None}
    return {n.replace(".default", "").replace("vector.weight", "vector"): g for n, g in named.items()}


@pytest.mark.parametrize(("arch", "quantize"), [("llama", "none"), ("gpt2", "none"), ("llama", "nf4"), ("gpt2", "nf4")])
@pytest.mark.parametrize("knobs", [MIXED[1], MIXED[4], Lora(rank=4, alpha=3, rslora=True)], ids=["dora", "ranks", "rs"])
def test_logits_and_gradients_equal_pefts(knobs: Lora, arch: str, quantize: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base", arch)
    if arch == "gpt2" and knobs.ranks:
        knobs = knobs.model_copy(update={"ranks": {"attn.c_proj": 5}, "alphas": {r".*h\.0\..*": 7}})
    model, bank = bank_of(folder, quantize)
    bank.add(0, knobs, seed=5)
    untrained = forward(model, bank)
    torch.testing.assert_close(untrained, forward(model), rtol=1e-5, atol=1e-5)
    shaken(bank)
    base = dense(folder) if quantize == "nf4" else plain(folder)
    peft = PeftModel.from_pretrained(base, save(bank, tmp_path / "delta"), is_trainable=True).eval()
    ours, theirs = forward(model, bank), forward(peft)
    assert (ours - untrained).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    with bank.routed(torch.zeros_like(TOKENS_BT)):
        forward(model).square().mean().backward()
    bank.hand_out_gradients()
    theirs.square().mean().backward()
    expected = gradients(peft)
    assert expected.keys() == bank.parameters(0).keys()
    for name, parameter in bank.parameters(0).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


THEIRS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "r": 3},
    "rslora": {"use_rslora": True, "r": 6, "lora_alpha": 3},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 5}},
    "regexes": {"r": 4, "rank_pattern": {r"model\.layers\.0\.self_attn\.(q|k)_proj": 2}, "use_rslora": True},
    "prefixed": {"r": 2, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5}},
    "some": {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True, "rank_pattern": {"q_proj": 3}},
    "one": {"r": 2, "target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
}


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_pefts_folder_loads(options: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base")
    theirs = get_peft_model(plain(folder), LoraConfig(**{"target_modules": "all-linear", "lora_alpha": 8, **options}))
    torch.manual_seed(3)
    for parameter in (p for p in theirs.parameters() if p.requires_grad):
        parameter.data += torch.randn_like(parameter) * 0.2
    theirs.eval().save_pretrained(tmp_path / "theirs")
    delta = load_delta(tmp_path / "theirs")
    knobs = knobs_from_peft(delta.peft_config)
    model, bank = bank_of(folder)
    bank.add(0, knobs, tensors=from_files(knobs, None, delta.tensors, bank.scope))
    torch.testing.assert_close(forward(model, bank), forward(theirs), rtol=1e-5, atol=2e-5)
    # And back again.
    again = PeftModel.from_pretrained(plain(folder), save(bank, tmp_path / "ours")).eval()
    torch.testing.assert_close(forward(again), forward(theirs), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_pissa_is_pefts_on_the_base_as_it_is(arch: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base", arch)
    model, bank = bank_of(folder)
    bank.add(0, Lora(rank=4, alpha=6, start="pissa"))
    config = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="pissa", target_modules="all-linear", fan_in_fan_out=arch == "gpt2"
    )
    theirs = get_peft_model(plain(folder), config)
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert layers.keys() == set(bank.sites(0))
    for site, layer in layers.items():
        product = layer.get_delta_weight("default")
        a_RI, b_OR = (bank.parameters(0)[f"{site}.lora_{x}.weight"] for x in "AB")
        ours = (b_OR @ a_RI) * 6 / 4
        torch.testing.assert_close(ours.T if layer.fan_in_fan_out else ours, product, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(model, bank), forward(model), rtol=1e-5, atol=1e-5)
    ours_by_sgd = torch.optim.SGD(bank.parameters(0).values(), lr=0.1)
    theirs_by_sgd = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        bank.zero_grad()
        with bank.routed(torch.zeros_like(TOKENS_BT)):
            forward(model).square().mean().backward()
        bank.hand_out_gradients()
        ours_by_sgd.step()
        theirs_by_sgd.zero_grad()
        forward(theirs).square().mean().backward()
        theirs_by_sgd.step()
    logits = forward(model, bank)
    assert (logits - forward(model)).abs().max() > 0.1
    torch.testing.assert_close(logits, forward(theirs), rtol=1e-4, atol=1e-4)
    # Saved, it is a plain LoRA of twice the rank, which needs no residual base.
    out = save(bank, tmp_path / "delta")
    assert (load_delta(out).peft_config["r"], load_delta(out).peft_config.get("init_lora_weights")) == (8, None)
    loaded = PeftModel.from_pretrained(plain(folder), out).eval()
    torch.testing.assert_close(forward(loaded), logits, rtol=1e-5, atol=2e-5)


def test_a_peft_pissa_stands_on_another_base(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base")
    theirs = get_peft_model(plain(folder), LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "moved")
    # peft itself goes back to the moved base when it loads this; what is in the file does not say how.
    with pytest.raises(MethodError, match="path_initial_model_for_weight_conversion"):
        knobs_from_peft(load_delta(tmp_path / "moved").peft_config)


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True}, {"ranks": {"v_proj": 5}, "alphas": {r".*layers\.0\..*": 7}}], ids=str
)
def test_a_pissa_folder_is_a_plain_lora(options: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base")
    model, bank = bank_of(folder)
    bank.add(0, Lora(rank=3, alpha=6, start="pissa", **options))
    shaken(bank)
    logits, out = forward(model, bank), save(bank, tmp_path / "delta")
    torch.testing.assert_close(forward(PeftModel.from_pretrained(plain(folder), out)), logits, rtol=1e-5, atol=2e-5)
    delta = load_delta(out)
    bank.add(1, knobs := knobs_from_peft(delta.peft_config), tensors=from_files(knobs, None, delta.tensors, bank.scope))
    torch.testing.assert_close(forward(model, bank, [1, 1]), logits, rtol=1e-5, atol=2e-5)


def test_pissa_keeps_its_start_while_it_learns(tmp_path: Path) -> None:
    _, bank = bank_of(tiny.save(tmp_path))
    bank.add(0, Lora(rank=2, start="pissa"))
    before = bank.tensors(0)
    shaken(bank)
    for name, after in bank.tensors(0).items():
        was, now = (t if "lora_A" in name else t.T for t in (before[name], after))
        assert not torch.equal(was[:2], now[:2])
        assert torch.equal(was[2:], now[2:])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_loftq_gives_back_what_quantization_took(arch: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base", arch)
    source = plain(folder)
    model, bank = bank_of(folder, "nf4")
    bank.add(0, Lora(rank=8, alpha=4, start="loftq"))
    for site in bank.sites(0):
        twin = source.get_submodule(site)
        weight_OI = twin.weight.T if is_transposed(twin) else twin.weight
        held_OI = dense_weight(model.get_submodule(site))
        a_RI, b_OR = (bank.windows(0)[f"{site}.lora_{x}.weight"] for x in "AB")
        taken = weight_OI - held_OI
        left = taken - (b_OR @ a_RI) * 4 / 8
        # No matrix of this rank leaves less (Eckart & Young): what is left are the other singular values.
        least = torch.linalg.svdvals(taken)[8:].square().sum().sqrt()
        torch.testing.assert_close(left.norm(), least, rtol=1e-3, atol=1e-5)
        assert left.norm() < 0.95 * taken.norm()
    better = (forward(model, bank) - forward(source)).square().mean()
    assert better < (forward(model) - forward(source)).square().mean()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_loftq_equals_pefts(arch: str, tmp_path: Path) -> None:
    """peft's whole start needs a GPU; its decomposition does not."""
    folder = tiny.save(tmp_path / "base", arch)
    _, bank = bank_of(folder, "nf4")
    bank.add(0, Lora(rank=4, alpha=4, start="loftq"))
    for site in bank.sites(0):
        product = bank.windows(0)[f"{site}.lora_B.weight"] @ bank.windows(0)[f"{site}.lora_A.weight"]
        taken = bank.scope.source(site) - bank.scope.weights(site)["weight"]
        theirs = loftq_utils._low_rank_decomposition(taken, reduced_rank=4)
        torch.testing.assert_close(product, theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-5)


def test_loftq_needs_a_quantized_base(tmp_path: Path) -> None:
    _, bank = bank_of(tiny.save(tmp_path))
    with pytest.raises(MethodError, match=r"q_proj is not quantized; take start: zero"):
        bank.add(0, Lora(start="loftq"))
    assert bank.slots == ()


def test_loraplus_equals_pefts_optimizer(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base")
    model, bank = bank_of(folder)
    bank.add(0, Lora(rank=4, alpha=8, lr_ratio=16))
    shaken(bank)
    theirs = PeftModel.from_pretrained(plain(folder), save(bank, tmp_path / "delta"), is_trainable=True).eval()
    train = Train(lr=1e-3, warmup=0, schedule="constant", clip=0.0, weight_decay=0.0)
    engine = Engine(Zero(), stage=0, device=torch.device("cpu"), dtype=torch.float32)
    trial = Trial(bank, engine, 0, train, total=5)
    name_of = {id(p): n for n, p in bank.parameters(0).items()}
    groups = {g["ratio"]: {name_of[id(p)] for p in g["params"]} for g in trial.optimizer.param_groups}
    assert groups == {r: {n for n in bank.parameters(0) if x in n} for r, x in ((1.0, "lora_A"), (16.0, "lora_B"))}
    optimizer = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
    )
    for _ in range(5):
        bank.zero_grad()
        with bank.routed(torch.zeros_like(TOKENS_BT)):
            forward(model).square().mean().backward()
        bank.hand_out_gradients()
        trial.update()
        optimizer.zero_grad()
        forward(theirs).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(forward(model, bank), forward(theirs), rtol=1e-4, atol=1e-4)


def test_dropout_scales_what_peft_scales(tmp_path: Path) -> None:
    """With all but everything dropped, DoRA loses what peft's does: factor and update see the dropped input."""
    folder = tiny.save(tmp_path / "base")
    model, bank = bank_of(folder)
    bank.add(0, Lora(rank=4, alpha=8, dora=True, dropout=0.5), seed=2)
    shaken(bank)
    site = bank.sites(0)[0]
    layer = PeftModel.from_pretrained(plain(folder), save(bank, tmp_path / "d"), is_trainable=True).train()
    theirs = layer.get_submodule(f"base_model.model.{site}")
    module = model.get_submodule(site)
    x_NI = torch.randn(4096, bank.scope.linears[site][1], generator=torch.Generator().manual_seed(0)) * 0 + 1
    slot_BT, at_BT = torch.zeros(1, 4096, dtype=torch.long), torch.arange(4096).unsqueeze(0)
    with torch.no_grad(), bank.routed(slot_BT, position_BT=at_BT, sample_BT=slot_BT, steps={0: 0}):
        ours = module(x_NI.unsqueeze(0))[0]
    with torch.no_grad():
        expected = theirs(x_NI)
    spread = expected.std(0)
    torch.testing.assert_close(ours.std(0), spread, rtol=0.1, atol=1e-3)
    assert ((ours.mean(0) - expected.mean(0)).abs() < 6 * spread / 64 + 1e-4).all()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_mixed_pack_equals_its_solo_runs(quantize: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    model, bank = bank_of(folder, quantize)
    rows = [3, 1, -1, 4, 0, 2]
    tokens_BT = torch.randint(3, tiny.VOCAB, (len(rows), 12), generator=torch.Generator().manual_seed(2))
    for slot, knobs in enumerate(MIXED):
        bank.add(slot, knobs, seed=slot)
        shaken(bank, slot)

    def run(bank: Bank, model: Any, tokens_BT: torch.Tensor, slots: list[int]) -> torch.Tensor:
        bank.zero_grad()
        with bank.routed(torch.tensor(slots).unsqueeze(1).expand(tokens_BT.shape)):
            logits: torch.Tensor = model(input_ids=tokens_BT, use_cache=False).logits
            if logits.requires_grad:
                logits.square().mean((1, 2)).sum().backward()
        bank.hand_out_gradients()
        return logits.detach()

    together = run(bank, model, tokens_BT, rows)
    grads = {slot: {n: p.grad.clone() for n, p in bank.parameters(slot).items()} for slot in bank.slots}
    for row, slot in enumerate(rows):
        alone, solo = bank_of(folder, quantize)
        if slot >= 0:
            solo.add(0, bank.knobs(slot), tensors=bank.tensors(slot))
        logits = run(solo, alone, tokens_BT[row : row + 1], [0 if slot >= 0 else -1])
        torch.testing.assert_close(together[row : row + 1], logits, rtol=1e-5, atol=2e-5)
        for name, parameter in (solo.parameters(0) if slot >= 0 else {}).items():
            torch.testing.assert_close(grads[slot][name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("broken", range(3), ids=["lora", "dora", "pissa"])
def test_nan_stays_in_its_slot(broken: int, tmp_path: Path) -> None:
    model, bank = bank_of(tiny.save(tmp_path))
    knobs = [*MIXED[:3], MIXED[broken]]
    for slot, own in enumerate(knobs):
        bank.add(slot, own, seed=slot)
        shaken(bank, slot)
    rows = torch.tensor([0, 1, 2, 3, -1]).unsqueeze(1).expand(5, 12)
    tokens_BT = TOKENS_BT[:1].expand(5, 12)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        bank.zero_grad()
        with bank.routed(rows):
            logits = model(input_ids=tokens_BT, use_cache=False).logits
            torch.where(logits.isfinite(), logits, 0).square().mean().backward()
        bank.hand_out_gradients()
        return logits.detach(), {f"{s}.{n}": p.grad.clone() for s in range(3) for n, p in bank.parameters(s).items()}

    before, grads = run()
    for parameter in bank.parameters(3).values():
        parameter.data.fill_(float("nan"))
    after, grads_after = run()
    assert after[3].isnan().all()
    torch.testing.assert_close(after[[0, 1, 2, 4]], before[[0, 1, 2, 4]], rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_after[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_merging_dora_and_pissa_changes_nothing(arch: str, quantize: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, arch)
    model, bank = bank_of(folder, quantize)
    for slot, knobs in enumerate((MIXED[1], MIXED[2])):
        bank.add(slot, knobs, seed=slot)
        shaken(bank, slot)
        expected = forward(model, bank, [slot, slot])
        dense_model = dense(folder) if quantize == "nf4" else plain(folder)
        method = method_of(knobs)
        for site in bank.sites(slot):
            own = {n.removeprefix(f"{site}."): t for n, t in bank.tensors(slot).items() if n.startswith(f"{site}.")}
            change = method.weight_change(knobs, site, own, bank.scope.weights(site))
            twin = dense_model.get_submodule(site)
            assert isinstance(twin, Linear)
            assert change is not None
            assert change.keys() == {"weight"}
            twin.weight.data += change["weight"].T if is_transposed(twin) else change["weight"]
        torch.testing.assert_close(forward(dense_model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("knob", ["ranks", "alphas"])
def test_a_pattern_without_a_layer_names_the_nearest(knob: str, tmp_path: Path) -> None:
    _, bank = bank_of(tiny.save(tmp_path))
    with pytest.raises(MethodError, match=r"method\.ranks and method\.alphas: 'v_porj' .* nearest is 'v_proj'"):
        bank.add(0, Lora(targets=("q_proj", "v_proj"), **{knob: {"v_porj": 4}}))
    with pytest.raises(MethodError, match="matches no"):  # a layer of the base, but none that is trained
        bank.add(0, Lora(targets=("q_proj",), **{knob: {"v_proj": 4}}))
    assert bank.slots == ()
