"""Bottleneck adapters against a plain torch module inserted by hand, on their own and in mixed packs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, Qwen2MoeConfig

from orchestrator.base import load_base
from orchestrator.config import Base
from orchestrator.config.method import Bottleneck, Lora
from orchestrator.errors import MethodError
from orchestrator.methods import Bank
from tests import tiny

TOKENS_BT = torch.randint(3, tiny.VOCAB, (6, 16), generator=torch.Generator().manual_seed(1))
BERT = BertConfig(
    vocab_size=tiny.VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
# Fused experts beside a shared one, whose last linear is not that of the block.
SHARED = Qwen2MoeConfig(
    vocab_size=tiny.VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
    num_experts=4,
)
# Per architecture: the list of layers, and in a layer the last linear of attention, that of the feed-forward block,
# and the part whose input is that of the feed-forward block.
WHERE = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "phi3": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gemma3": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", "mlp"),
    "bert": ("encoder.layer", "attention.output.dense", "output.dense", "intermediate.dense"),
}
MIX = [
    Bottleneck(size=3, placement="houlsby"),
    Bottleneck(size=7, placement="pfeiffer", scale=0.5),
    Bottleneck(size=4, placement="parallel", activation="gelu", scale=4.0),
    Bottleneck(size=5, placement="houlsby", activation="silu"),
    Bottleneck(size=2, placement="parallel"),
]


class Adapter(nn.Module):
    """The figure of the paper, in plain torch."""

    def __init__(self, width: int, knobs: Bottleneck) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(width, knobs.size), nn.Linear(knobs.size, width), knobs.scale
        self.act = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}[knobs.activation]

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * self.up(self.act(self.down(z)))


def by_hand(model: Any, arch: str, knobs: Bottleneck, bank: Bank) -> dict[str, nn.Parameter]:
    """Hang adapters with the bank's values into an untouched model; its parameters under the bank's names."""
    layers, attention, feed_forward, whole = WHERE[arch]
    made: dict[str, nn.Parameter] = {}
    for i in range(2):
        for name in (attention, feed_forward) if knobs.placement == "houlsby" else (feed_forward,):
            site = f"{layers}.{i}.{name}"
            adapter = Adapter(64, knobs)
            adapter.load_state_dict({n: bank.tensors(0)[f"{site}.{n}"] for n, _ in adapter.named_parameters()})
            made |= {f"{site}.{n}": p for n, p in adapter.named_parameters()}
            if knobs.placement == "parallel":
                seen: list[Tensor] = []
                part = model.get_submodule(f"{layers}.{i}.{whole}")
                part.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                hook = lambda _, __, y, seen=seen, adapter=adapter: y + adapter(seen.pop())  # noqa: E731
            else:
                hook = lambda _, __, y, adapter=adapter: y + adapter(y)  # noqa: E731
            model.get_submodule(site).register_forward_hook(hook)
    return made


def output(model: Any, tokens_BT: Tensor = TOKENS_BT) -> Tensor:
    made = model(input_ids=tokens_BT)
    return made.logits if "logits" in made else made.last_hidden_state


def filled(bank: Bank, slot: int, knobs: Any) -> None:
    bank.add(slot, knobs, seed=slot)
    generator = torch.Generator().manual_seed(slot)
    for parameter in bank.parameters(slot).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("arch", WHERE)
def test_outputs_and_gradients_equal_those_of_adapters_put_in_by_hand(arch: str, placement: str) -> None:
    torch.manual_seed(0)
    config = BERT if arch == "bert" else tiny.CONFIGS[arch]
    plain = (AutoModel if arch == "bert" else AutoModelForCausalLM).from_config(config).eval().requires_grad_(False)
    for parameter in plain.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    theirs = copy.deepcopy(plain)
    knobs = Bottleneck(size=6, placement=placement, scale=2.0, activation="gelu")
    bank = Bank(plain)
    filled(bank, 0, knobs)
    expected_of = by_hand(theirs, arch, knobs, bank)
    with bank.routed(torch.zeros_like(TOKENS_BT)):
        ours = output(plain)
        ours.square().mean().backward()
    expected = output(theirs)
    expected.square().mean().backward()
    bank.hand_out_gradients()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (ours - output(plain)).abs().max() > 0.1
    assert bank.parameters(0).keys() == expected_of.keys()
    for name, parameter in bank.parameters(0).items():
        assert expected_of[name].grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected_of[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_untrained_is_the_base_and_slots_at_once_equal_each_alone(quantize: str, tmp_path: Path) -> None:
    model = load_base(Base(id=str(tiny.save(tmp_path)), quantize=quantize)).model
    plain = output(model)
    bank = Bank(model)
    for slot, knobs in enumerate(MIX):
        bank.add(slot, knobs)
        with bank.routed(torch.full_like(TOKENS_BT, slot)):
            assert torch.equal(output(model), plain)
        assert not any(t.any() for n, t in bank.tensors(slot).items() if not n.endswith("down.weight"))
        bank.remove(slot)
    for slot, knobs in enumerate([*MIX, Lora(rank=2)]):
        filled(bank, slot, knobs)
    alone = []
    for slot in range(6):
        with bank.routed(torch.full((1, 16), slot)):
            alone.append(output(model, TOKENS_BT[slot : slot + 1]))
            alone[-1].square().sum().backward()
    bank.hand_out_gradients()
    grads = {(s, n): p.grad.clone() for s in range(6) for n, p in bank.parameters(s).items()}
    bank.zero_grad()
    with bank.routed(torch.arange(6).unsqueeze(1).expand(6, 16)):
        together = output(model)
        together.square().sum().backward()
    bank.hand_out_gradients()
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    for (slot, name), grad in grads.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(bank.parameters(slot)[name].grad, grad, rtol=1e-4, atol=1e-5 * scale)


def test_dropout_is_on_what_the_adapter_reads(tmp_path: Path) -> None:
    model = load_base(Base(id=str(tiny.save(tmp_path)), quantize="none")).model
    bank = Bank(model)
    filled(bank, 0, Bottleneck(size=4, placement="parallel", dropout=0.5))
    position_BT = torch.arange(16).expand(6, 16)
    sample_BT = torch.arange(6).unsqueeze(1).expand(6, 16)

    def run(rows: list[int], step: int | None) -> Tensor:
        steps = None if step is None else {0: step}
        places = {"position_BT": position_BT[rows], "sample_BT": sample_BT[rows]}
        with bank.routed(torch.zeros(len(rows), 16, dtype=torch.long), steps=steps, **places):
            return output(model, TOKENS_BT[rows])

    torch.testing.assert_close(run([2], 1)[0], run([0, 1, 2, 3], 1)[2], rtol=1e-5, atol=1e-5)
    assert (run([2], 1) - run([2], 2)).abs().max() > 1e-2
    assert (run([2], 1) - run([2], None)).abs().max() > 1e-2


def test_growing_keeps_the_function_and_shrinking_keeps_the_larger_units(tmp_path: Path) -> None:
    model = load_base(Base(id=str(tiny.save(tmp_path)), quantize="none")).model
    bank = Bank(model)
    filled(bank, 0, MIX[1])

    def zero() -> Tensor:
        with bank.routed(torch.zeros_like(TOKENS_BT)):
            return output(model)

    before = zero()
    bank.resize(0, MIX[1].model_copy(update={"size": 11, "scale": 2.0}))
    torch.testing.assert_close(zero(), before, rtol=1e-5, atol=1e-5)
    bank.resize(0, MIX[1])
    torch.testing.assert_close(zero(), before, rtol=1e-5, atol=1e-5)  # the four new units had nothing behind them
    with pytest.raises(MethodError, match="keeps its method"):
        bank.resize(0, MIX[2])


@pytest.mark.parametrize("config", [tiny.MOE, SHARED])
def test_a_block_whose_last_linear_is_not_known_is_refused(config: Any) -> None:
    bank = Bank(AutoModelForCausalLM.from_config(config))
    with pytest.raises(MethodError, match="layer 0 is not known"):
        bank.add(0, Bottleneck())
    assert bank.slots == ()
