"""``manta deltas`` on a real store, and merging against peft's own ``merge_and_unload``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from orchestrator.base import source_identity
from orchestrator.cli_deltas import app
from orchestrator.config import Base, Lora
from orchestrator.delta import Delta, load_delta, save_delta
from orchestrator.errors import ConfigError, DeltaError, MethodError, RegistryError, WrongBaseError
from orchestrator.merge import merged


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def adapter(model: Any, folder: Path, targets: list[str], **over: Any) -> Path:
    """A folder written by peft, with B away from zero."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **over)
    wrapped = get_peft_model(model, config)
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "README.md").write_text("theirs")
    (folder / "training_args.bin").write_text("pickle")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    return adapter(model, tmp_path_factory.mktemp("plain") / "support-lora", ["q_proj", "down_proj"])


def ours(plain: Path, base: Path, folder: Path) -> Delta:
    """The same tensors with a manifest that ties them to the base."""
    delta = load_delta(plain)
    knobs = Lora(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
    identity = source_identity(Base(id=str(base)))
    return save_delta(folder, delta.tensors, {"name": "x", "base": identity, "method": knobs}, delta.peft_config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    return found


# Merging


def test_merged_equals_peft(base: Path, plain: Path, tmp_path: Path) -> None:
    warnings = merged(ours(plain, base, tmp_path / "d"), base, tmp_path / "m")
    assert len(warnings) == 1
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain).merge_and_unload()
    theirs.save_pretrained(tmp_path / "t")
    expected, got, before = weights(tmp_path / "t"), weights(tmp_path / "m"), weights(base)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(got[name], before[name]) != name.endswith(("q_proj.weight", "down_proj.weight"))
    tokens = torch.arange(16)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {p.name for p in base.iterdir()} - {"training_args.bin"}
    assert "merged" in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"]])
def test_merged_equals_peft_where_weights_are_transposed(targets: list[str], tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "b")
    plain = adapter(gpt2(), tmp_path / "p", targets, fan_in_fan_out=True)
    assert merged(load_delta(plain), tmp_path / "b", tmp_path / "m")[0].startswith("the delta has no manifest")
    tokens = torch.arange(16)[None]
    theirs = PeftModel.from_pretrained(gpt2(), plain).merge_and_unload()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert (model(tokens).logits - gpt2()(tokens).logits).abs().max() > 0.01
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_merged_dora_equals_peft(base: Path, tmp_path: Path) -> None:
    plain = adapter(llama(), tmp_path / "dora", ["q_proj", "down_proj"], use_dora=True)
    merged(load_delta(plain), base, tmp_path / "m")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain).merge_and_unload()
    tokens = torch.arange(16)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_merged_bf16_is_the_fp32_sum_rounded_once(plain: Path, tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "b")
    delta = load_delta(plain)
    merged(delta, tmp_path / "b", tmp_path / "m")
    site = "model.layers.1.self_attn.q_proj"
    before, after = weights(tmp_path / "b")[f"{site}.weight"], weights(tmp_path / "m")[f"{site}.weight"]
    change = 2.0 * delta.tensors[f"{site}.lora_B.weight"] @ delta.tensors[f"{site}.lora_A.weight"]
    assert torch.equal(after, (before.float() + change).to(torch.bfloat16))


def test_merging_refuses_what_it_cannot_do(base: Path, plain: Path, tmp_path: Path) -> None:
    llama(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBaseError):
        merged(ours(plain, base, tmp_path / "d"), tmp_path / "other", tmp_path / "m")
    wide = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(MethodError, match="made for another base"):
        merged(load_delta(plain), tmp_path / "wide", tmp_path / "m")
    shallow = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    shallow.num_attention_heads = 4
    LlamaForCausalLM(shallow).save_pretrained(tmp_path / "shallow")
    with pytest.raises(MethodError, match="belongs to no layer"):
        merged(load_delta(plain), tmp_path / "shallow", tmp_path / "m")
    foreign = save_delta(tmp_path / "vera", {"base_model.vera_A": torch.ones(2, 2)}, None, {"peft_type": "VERA"})
    with pytest.raises(MethodError, match="merge_and_unload"):
        merged(foreign, base, tmp_path / "m")
    with pytest.raises(DeltaError, match="exists already"):
        merged(load_delta(plain), base, base)
    assert not (tmp_path / "m").exists()


# The command


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('cli')}/mlflow.db"


def call(uri: str, *arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--uri", uri], env={"COLUMNS": "200", "TERM": "dumb"})


def said(uri: str, *arguments: object) -> str:
    result = call(uri, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_whole_walk(uri: str, base: Path, plain: Path, tmp_path: Path) -> None:
    assert "no deltas" in said(uri, "list")
    assert json.loads(said(uri, "list", "--json")) == []
    assert "support:1 is registered as candidate" in said(
        uri, "import", plain, "--name", "support", "--base", base, "--owner", "ann[b]"
    )
    assert "support@champion is version 1" in said(uri, "promote", "support:1", "--by", "bob")
    table = said(uri, "list")
    for part in ("support:1", "candidate, champion", "lora", "ann[b]"):
        assert part in table
    (record,) = json.loads(said(uri, "list", "support", "--json"))
    assert record == json.loads(said(uri, "show", "support", "--json"))
    assert (record["ref"], record["moves"]["champion"]["by"]) == ("support:1", "bob")
    assert record["tags"]["manta.base.source_hash"] == source_identity(Base(id=str(base))).source_hash
    shown = said(uri, "show", "support")
    for part in ("by bob", record["sha256"], record["tags"]["manta.base.source_hash"]):
        assert part in shown

    said(uri, "export", "support", "--peft", tmp_path / "p")
    tokens = torch.arange(16)[None]
    first = PeftModel.from_pretrained(llama(), tmp_path / "p")(tokens).logits
    torch.testing.assert_close(first, PeftModel.from_pretrained(llama(), plain)(tokens).logits)
    out = said(uri, "export", "support", "--merged", tmp_path / "m", "--base", base)
    assert "warning: " in out
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")(tokens).logits, first, rtol=1e-5, atol=1e-5
    )
    out = said(uri, "export", "support", "--lora", tmp_path / "l", "--base", base, "--rank", 4)
    assert "as a LoRA of rank 4" in out
    assert "layer's change: worst" in out
    torch.testing.assert_close(
        PeftModel.from_pretrained(llama(), tmp_path / "l")(tokens).logits, first, rtol=1e-5, atol=1e-5
    )
    said(uri, "export", tmp_path / "p", "--peft", tmp_path / "again")
    assert load_delta(tmp_path / "again").sha256 == record["sha256"]
    assert isinstance(call(uri, "export", "support", "--peft", base).exception, DeltaError)

    for scale in (2.0, 3.0):
        delta = load_delta(plain)
        more = save_delta(
            tmp_path / f"v{scale}", {k: v * scale for k, v in delta.tensors.items()}, None, delta.peft_config
        )
        said(uri, "import", more.path, "--name", "support", "--base", base)
    assert "1 version would be deleted" not in said(uri, "gc", "--keep", 2)
    assert "support:2" in said(uri, "gc", "--keep", 1)
    assert len(json.loads(said(uri, "list", "support", "--json"))) == 3
    assert "1 version deleted" in said(uri, "gc", "support", "--keep", 1, "--yes")
    assert [v["version"] for v in json.loads(said(uri, "list", "support", "--json"))] == [3, 1]


def test_base_named_in_the_config_is_taken(uri: str, plain: Path, base: Path) -> None:
    said(uri, "import", plain, "--name", "implicit")
    record = json.loads(said(uri, "show", "implicit", "--json"))
    assert record["tags"]["manta.base.id"] == str(base)
    said(uri, "import", plain, "--name", "unchecked", "--unchecked")
    assert "manta.base.source_hash" not in json.loads(said(uri, "show", "unchecked", "--json"))["tags"]


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        (["show", "../etc/passwd"], RegistryError, "not a delta name"),
        (["show", "nothing"], RegistryError, "no delta 'nothing'"),
        (["promote", "a", "--alias", "v1"], RegistryError, "not an alias"),
        (["export", "a"], ConfigError, "--peft DIR"),
        (["export", "a", "--merged", "m"], ConfigError, "go together"),
        (["export", "a", "--peft", "p", "--base", "b"], ConfigError, "go together"),
        (["export", "a", "--lora", "p"], ConfigError, "go together"),
        (["export", "a", "--merged", "p", "--base", "b", "--rank", "4"], ConfigError, "both or neither"),
        (["import", "/nowhere", "--name", "a"], DeltaError, "no such folder"),
        (["import", "/nowhere", "--name", "../a", "--unchecked"], RegistryError, "not a delta name"),
    ],
)
def test_mistakes_are_our_errors(uri: str, arguments: list[str], error: type[Exception], part: str) -> None:
    caught = call(uri, *arguments).exception
    assert isinstance(caught, error)
    assert part in str(caught)


def test_help_does_not_load_torch_or_mlflow() -> None:
    import subprocess
    import sys

    code = "import sys, orchestrator.cli_deltas; print(sorted({'torch', 'mlflow', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
