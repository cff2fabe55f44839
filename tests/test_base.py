"""The base loader against transformers' own loading, dense and 4-bit."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BitsAndBytesConfig,
    PretrainedConfig,
    RobertaConfig,
)

from orchestrator.base import dense_weight, load_base, load_tokenizer, source_identity
from orchestrator.base.identity import source_hash
from orchestrator.base.linear import linear_sites
from orchestrator.config import Base
from orchestrator.errors import BaseModelError
from tests import tiny

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
    bnb_4bit_quant_storage=torch.uint8,
)
TOKENS_BT = torch.randint(3, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS_BT, use_cache=False).logits


@pytest.mark.parametrize("arch", [*tiny.CONFIGS, "mixtral"])
def test_dense_base_equals_transformers(arch: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, arch)
    ours = load_base(Base(id=str(folder), quantize="none"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(ours.model), logits(theirs), rtol=0, atol=1e-5)
    assert not any(p.requires_grad for p in ours.model.parameters())


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
def test_an_encoder_loads_as_well(config: type[PretrainedConfig], tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = AutoModel.from_config(config(vocab_size=tiny.VOCAB, **shape)).eval()
    theirs.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    ours = load_base(Base(id=str(tmp_path), quantize="none"), encoder=True)
    with torch.no_grad():
        expected, got = (m(input_ids=TOKENS_BT).last_hidden_state for m in (theirs, ours.model))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert load_base(Base(id=str(tmp_path)), encoder=True).report.quantized_fraction > 0.95


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "phi3", "gpt_neox"])
def test_nf4_base_equals_transformers_with_bitsandbytes(arch: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, arch)
    ours = load_base(Base(id=str(folder)))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=NF4)
    # Weights, not logits: on a CPU bitsandbytes' own forward rounds to bf16.
    compared = 0
    for name, module in linear_sites(ours.model):
        if (state := getattr(theirs.get_submodule(name).weight, "quant_state", None)) is not None:
            expected = dequantize_4bit(theirs.get_submodule(name).weight.data, state)
            torch.testing.assert_close(dense_weight(module), expected, rtol=0, atol=1e-6)
            compared += 1
    assert compared >= 8
    assert ours.report.quantized_fraction > 0.97
    assert (logits(ours.model) - logits(load_base(Base(id=str(folder), quantize="none")).model)).abs().max() > 1e-2


def test_gpt2_in_4_bits_is_near_its_dense_self(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path, "gpt2")
    held = dict(linear_sites(load_base(Base(id=str(folder))).model))
    dense = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_modules())
    for name in (n for n in held if "attn" in n or "mlp" in n):
        weight = dense[name].weight.T
        assert (dense_weight(held[name]) - weight).norm() / weight.norm() < 0.12


def test_int8_error_is_below_half_a_step(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    held = load_base(Base(id=str(folder), quantize="int8")).model.model.layers[0].mlp.up_proj
    weight = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight.float()
    step_O1 = weight.abs().amax(1, keepdim=True) / 127
    assert ((dense_weight(held) - weight).abs() <= step_O1 * 0.5001).all()


def test_gradient_flows_through_the_4_bit_linear(tmp_path: Path) -> None:
    layer = load_base(Base(id=str(tiny.save(tmp_path)))).model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    y = x.detach().requires_grad_()
    torch.nn.functional.linear(y, dense_weight(layer)).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_moe_experts_in_4_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="mixture-of-experts"):
        load_base(Base(id=str(tiny.save(tmp_path, "mixtral"))))


def test_identity_does_not_depend_on_file_layout(tmp_path: Path) -> None:
    one = tiny.save(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert source_hash(one) == source_hash(tmp_path / "many")
    assert source_hash(one) != source_hash(tiny.save(tmp_path / "other", seed=1))
    assert source_identity(Base(id=str(one))).recipe == "nf4-double/any"


def test_what_is_not_a_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no such directory"):
        load_base(Base(id=str(tmp_path / "absent")))
    folder = tiny.save(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BaseModelError, match="cut short"):
        load_base(Base(id=str(folder)))
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BaseModelError, match="pickled"):
        load_base(Base(id=str(folder)))
    other = tiny.save(tmp_path / "deep", num_hidden_layers=3)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    load_base(Base(id=str(folder), quantize="none"))
    (other / "model.safetensors").write_bytes((tiny.save(tmp_path / "flat") / "model.safetensors").read_bytes())
    with pytest.raises(BaseModelError, match="lack"):
        load_base(Base(id=str(other)))
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelError, match="tokenizer"):
        load_tokenizer(Base(id=str(other)))
    wide = tiny.save(tmp_path / "wide", intermediate_size=256)
    (wide / "model.safetensors").write_bytes((tmp_path / "flat" / "model.safetensors").read_bytes())
    with pytest.raises(BaseModelError, match=r"mlp\.\w+_proj\.weight has shape \[\d+, \d+\], not"):
        load_base(Base(id=str(wide)))


def test_random_weights_are_the_seeds(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path)
    first, again = (load_base(Base(id=str(folder), random_init=3)) for _ in range(2))
    torch.testing.assert_close(logits(first.model), logits(again.model), rtol=0, atol=0)
    assert first.identity.source_hash != source_identity(Base(id=str(folder))).source_hash
