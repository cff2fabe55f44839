"""bitfit, norms and ia3: against transformers' and peft's own, on every kind of layer, alone and mixed."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig

from orchestrator.base.norm import takes_off_mean
from orchestrator.config import IA3, BitFit, Lora, Norms, Sparse
from orchestrator.delta import load_delta
from orchestrator.errors import DeltaError, MethodError
from orchestrator.merge import merged
from orchestrator.methods import METHODS, Bank, Scope, knobs_from_peft
from tests import tiny
from tests.launch_kit import assert_same_bits, small, train_here, weights
from tests.method_kit import (
    TOKENS_BT,
    banked,
    base_of,
    forward,
    gradients,
    moved,
    passed,
    reloaded,
    saved,
)
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),  # peft says so of transformers' RMSNorm
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
]
KNOBS = {
    "bitfit": BitFit(),
    "norms": Norms(),
    "ia3": IA3(),
    "sparse": Sparse(density=0.05),
}
BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {arch: tiny.save(folder / arch, arch) for arch in tiny.CONFIGS} | {"phi": phi(folder / "phi")}


def phi(folder: Path) -> Path:
    """Normalization layers with a bias that work on heads."""
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PhiConfig(**sizes, num_attention_heads=4, qk_layernorm=True))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


# ---- promises


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_an_untrained_slot_is_the_base(arch: str, quantize: str, bases: dict[str, Path]) -> None:
    model = base_of(bases[arch], quantize)
    plain = forward(model)
    bank = Bank(model)
    for slot, knobs in enumerate(KNOBS.values()):
        bank.add(slot, knobs)
        assert torch.equal(passed(model, bank, [slot] * len(TOKENS_BT)), plain)
        moved(bank, slot)
        assert (passed(model, bank, [slot] * len(TOKENS_BT)) - plain).abs().max() > 1e-3


SLOTS: list[Any] = [
    BitFit(targets=("q_proj", "up_proj")),
    BitFit(),
    Norms(),
    Norms(targets=("input_layernorm", "q_norm"), biases=False),
    IA3(),
    IA3(targets=("down_proj", "q_proj"), feed_forward=()),
    Sparse(density=0.01),
    Sparse(density=0.05, choose="random"),
    Lora(rank=4),
]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_slots_at_once_equal_each_alone(arch: str, quantize: str, bases: dict[str, Path]) -> None:
    model = base_of(bases[arch], quantize)
    bank = Bank(model)
    for slot, knobs in enumerate(SLOTS):
        bank.add(slot, knobs, seed=slot)
        moved(bank, slot, slot)
    alone = base_of(bases[arch], quantize)
    for order in ([3, 0, 5, 7, -1], [1, 4, 2, 8, 6], [6, 7, 3, 2, 4]):
        together = passed(model, bank, order)
        for row, slot in enumerate(order):
            solo = Bank(alone)
            if slot >= 0:
                solo.add(0, bank.knobs(slot), tensors=bank.tensors(slot))
            expected = passed(alone, solo, [min(slot, 0)] * len(TOKENS_BT))[row]
            torch.testing.assert_close(together[row], expected, rtol=1e-4, atol=1e-5)
            solo.detach()


def test_a_slot_of_nan_stays_alone(bases: dict[str, Path]) -> None:
    model = base_of(bases["qwen3"])
    bank = Bank(model)
    for slot, knobs in enumerate([*KNOBS.values(), *KNOBS.values()]):
        bank.add(slot, knobs, seed=slot)
        moved(bank, slot, slot)

    def run(order: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        bank.zero_grad()
        logits = passed(model, bank, order)
        torch.where(logits.isfinite(), logits, 0).square().mean().backward()
        bank.hand_out_gradients()
        return logits, [p.grad.clone() for s in order[:2] for p in bank.parameters(s).values()]

    orders = [[0, 1, 4, 5, -1], [2, 3, 6, 7, -1]]
    before = [run(order) for order in orders]
    for slot in (4, 5, 6, 7):
        for parameter in bank.parameters(slot).values():
            parameter.data.fill_(float("nan"))
    for order, (logits, grads) in zip(orders, before, strict=True):
        after, grads_after = run(order)
        assert after[2:4].isnan().all()
        torch.testing.assert_close(after[[0, 1, 4]], logits[[0, 1, 4]], rtol=1e-5, atol=1e-6)
        for grad, grad_after in zip(grads, grads_after, strict=True):
            torch.testing.assert_close(grad_after, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", KNOBS)
@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_a_saved_delta_gives_the_same_outputs_and_merges(
    arch: str, method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    knobs = BitFit(targets=("c_attn", "mlp.c_proj")) if (method, arch) == ("bitfit", "gpt2") else KNOBS[method]
    model, bank = banked(bases[arch], knobs)
    expected = passed(model, bank)
    delta = saved(bank, tmp_path / "delta", bases[arch])
    assert torch.equal(passed(*reloaded(delta, bases[arch])), expected)
    if (method, arch) == ("bitfit", "gemma3"):
        with pytest.raises(MethodError, match=r"adds a bias to model\.layers\.0\.self_attn\.q_proj, which this arch"):
            merged(delta, bases[arch], tmp_path / "merged")
        return
    merged(delta, bases[arch], tmp_path / "merged")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(forward(dense), expected, rtol=1e-4, atol=1e-5)


def test_a_delta_fits_an_empty_base_or_does_not(bases: dict[str, Path]) -> None:
    """A preview looks at sizes without weights."""
    tensors = banked(bases["gpt2"], Norms())[1].tensors(0)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny.CONFIGS["gpt2"])
    bank = Bank(empty)
    bank.add(0, Norms(), tensors=tensors)
    assert bank.tensors(0).keys() == tensors.keys()
    with pytest.raises(DeltaError, match="is missing"):
        bank.add(1, BitFit(), tensors=tensors)


# ---- bitfit against transformers


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "phi", "llama"])
def test_bitfit_is_training_the_biases(arch: str, bases: dict[str, Path], tmp_path: Path) -> None:
    model, bank = banked(bases[arch], BitFit())
    logits, grads = gradients(model, bank)
    plain = AutoModelForCausalLM.from_pretrained(bases[arch], dtype=torch.float32).requires_grad_(False)
    if arch == "llama":  # the same model with biases of zero
        config = type(plain.config)(**{**plain.config.to_dict(), **BIASED})
        biased = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
        missing, unexpected = biased.load_state_dict(plain.state_dict(), strict=False)
        assert missing
        assert not unexpected
        assert all(name.endswith(".bias") for name in missing)
        plain = biased.eval()
        for name in missing:
            plain.get_parameter(name).data.zero_()
    biases = {n: p.requires_grad_() for n, p in plain.named_parameters() if n.endswith(".bias") and n != "lm_head.bias"}
    assert biases.keys() == bank.parameters(0).keys()
    for name, delta in bank.tensors(0).items():
        biases[name].data += delta
    theirs = forward(plain)
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-5)
    theirs.square().mean().backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, biases[name].grad, rtol=1e-4, atol=1e-6)


def test_bitfit_without_norms_leaves_them_alone(bases: dict[str, Path]) -> None:
    scope = Scope.of(base_of(bases["gpt2"]))
    sites = METHODS["bitfit"].sites(BitFit(norms=False), scope)
    assert list(sites) == list(scope.linears)
    assert set(METHODS["bitfit"].sites(BitFit(), scope)) - set(sites) == set(scope.norms)


# ---- norms and ia3 against peft


def with_peft(delta: Path, base: Path) -> Any:
    """The delta, loaded by peft on transformers' own model."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(plain, delta, is_trainable=True).eval()


def assert_same_gradients(model: Any, bank: Bank, theirs: Any) -> None:
    logits, grads = gradients(model, bank)
    expected = forward(theirs)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    expected.square().mean().backward()
    named = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    assert named.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, named[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["norms", "ia3"])
@pytest.mark.parametrize("arch", [*tiny.CONFIGS, "phi"])
def test_peft_reads_ours_with_equal_logits_and_gradients(
    arch: str, method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    model, bank = banked(bases[arch], KNOBS[method])
    saved(bank, tmp_path, bases[arch])
    assert_same_gradients(model, bank, with_peft(tmp_path, bases[arch]))


CONFIGS: list[tuple[str, Any]] = [
    *((arch, peft.LNTuningConfig) for arch in ("llama", "qwen3", "gemma3", "gpt2", "mistral")),
    *((arch, peft.IA3Config) for arch in ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "mistral")),
]


@pytest.mark.parametrize(("arch", "config"), CONFIGS, ids=lambda value: getattr(value, "__name__", value))
def test_ours_reads_pefts_with_equal_logits_and_gradients(
    arch: str, config: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    """peft's own choice of layers for each architecture."""
    plain = AutoModelForCausalLM.from_pretrained(bases[arch], dtype=torch.float32)
    theirs = peft.get_peft_model(plain, config(task_type="CAUSAL_LM")).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    theirs.save_pretrained(tmp_path)
    assert_same_gradients(*reloaded(load_delta(tmp_path), bases[arch]), theirs)


@pytest.mark.parametrize("kind", ["LN_TUNING", "IA3"])
def test_what_is_not_done_is_refused(kind: str) -> None:
    config = {"peft_type": kind, "target_modules": ["norm"], "feedforward_modules": []}
    assert knobs_from_peft(config).targets == ("norm",)
    with pytest.raises(MethodError, match="has modules_to_save, which"):
        knobs_from_peft({**config, "modules_to_save": ["lm_head"]})
    with pytest.raises(MethodError, match="no target_modules"):
        knobs_from_peft({"peft_type": kind})


# ---- norms: which kind is it


class GatedNorm(torch.nn.Module):
    """Looks at more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (8,), self.weight, self.eps)


def test_what_a_layer_does_is_asked_of_itself(bases: dict[str, Path]) -> None:
    for arch, expected in {"llama": False, "qwen3": False, "gemma3": False, "gpt2": True, "gpt_neox": True}.items():
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(tiny.CONFIGS[arch])
        for model in (base_of(bases[arch]), empty):
            scope = Scope.of(model)
            assert set(scope.takes_off_mean) == set(scope.norms)
            assert set(scope.takes_off_mean.values()) == {expected}
    assert takes_off_mean(torch.nn.RMSNorm(8)) is False
    assert takes_off_mean(torch.nn.LayerNorm(8, bias=False)) is True
    assert takes_off_mean(torch.nn.GroupNorm(2, 8)) is None
    assert takes_off_mean(GatedNorm()) is None


def test_a_layer_that_is_neither_is_refused_by_name(bases: dict[str, Path]) -> None:
    model = base_of(bases["llama"])
    model.model.layers[1].input_layernorm = GatedNorm()
    with pytest.raises(MethodError, match=r"model.layers.1.input_layernorm is neither LayerNorm nor RMSNorm"):
        Bank(model).add(0, Norms())
    with pytest.raises(MethodError, match=r"'input_norm' matches no normalization layer.*'input_layernorm'.*all-norms"):
        Bank(model).add(0, Norms(targets=("input_norm",)))


# ---- ia3: which layers


def test_auto_finds_keys_values_and_feed_forward(bases: dict[str, Path]) -> None:
    fused = {"gpt2": ("c_attn", "mlp.c_proj"), "gpt_neox": ("query_key_value", "dense_4h_to_h")}
    fused["phi3"] = ("qkv_proj", "down_proj")
    for arch in tiny.CONFIGS:
        scope = Scope.of(base_of(bases[arch]))
        sites = METHODS["ia3"].sites(IA3(), scope)
        *outputs, inputs = fused.get(arch, ("k_proj", "v_proj", "down_proj"))
        assert {s for s, hook in sites.items() if hook == "output"} == {
            s for s in scope.linears if s.endswith(tuple(outputs))
        }
        assert {s for s, hook in sites.items() if hook == "input"} == {s for s in scope.linears if s.endswith(inputs)}
    with pytest.raises(MethodError, match="nothing to train"):
        METHODS["ia3"].sites(IA3(targets=(), feed_forward=()), scope)
    with pytest.raises(MethodError, match=r"method.feed_forward: 'down' matches no linear layer.*'down_proj'|'down'"):
        METHODS["ia3"].sites(IA3(feed_forward="down"), scope)


# ---- training


@pytest.mark.parametrize("method", ["bitfit", "norms", "ia3"])
def test_training_lowers_the_loss_and_resumes_with_the_same_bits(
    method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    run = small(f"base={bases['llama']}", f"method={method}", "train.lr=0.02", "train.steps=7")
    whole = train_here(run, tmp_path / "whole")
    losses = whole.of("step", "loss")
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.1
    first = train_here(run, tmp_path / "parts", stop_at=3)
    second = train_here(run, tmp_path / "parts")
    assert first.of("step", "loss") + second.of("step", "loss") == losses
    assert whole.latest is not None
    assert second.latest is not None
    assert_same_bits(weights(whole.latest / "delta" / "delta"), weights(second.latest / "delta" / "delta"))
    assert json.loads((whole.latest / "delta" / "delta" / "manta.json").read_text())["method"]["type"] == method


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bitfit", "norms", "ia3"])
def test_two_ranks_that_share_a_base_train_as_one(method: str, bases: dict[str, Path], tmp_path: Path) -> None:
    overrides = [f"base={bases['qwen3']}", "base.quantize=nf4", f"method={method}", "train.lr=0.02", "train.steps=3"]
    alone = train_here(small(*overrides), tmp_path / "alone")
    sharded = [*overrides, "shard=3", "cluster.zero.persistence_threshold=10"]
    for report in run_ranks("tests.work_script", 2, tmp_path / "ranks", overrides=sharded):
        losses = torch.tensor(alone.of("step", "loss"))
        torch.testing.assert_close(torch.tensor(report["losses"]), losses, rtol=1e-4, atol=1e-5)
