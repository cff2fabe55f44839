"""Delta folders: peft's own loader is the truth for the layout; damaged and hostile folders are refused."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator.config import Identity, Lora
from orchestrator.delta import (
    Delta,
    check_base,
    delta_hash,
    files,
    load_delta,
    new_manifest,
    read_tensors,
    redact,
    redacted,
    save_delta,
    write_tensors,
)
from orchestrator.errors import DeltaError, WrongBaseError

IDENTITY = Identity(id="tiny", source_hash="a" * 64, recipe="none/fp32", template_hash="c" * 64, licence="mit")
TARGETS = ("q_proj", "down_proj")


def tiny(seed: int = 0) -> LlamaForCausalLM:
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


def peft_config(**over: Any) -> dict[str, Any]:
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8.0, "base_model_name_or_path": "x"}
    return {**fields, "target_modules": list(TARGETS), **over}


def lora_tensors(model: torch.nn.Module, rank: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site, module in model.named_modules():
        if site.endswith(TARGETS):
            tensors[f"{site}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.3
            tensors[f"{site}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.3
    return tensors


def fields(**over: Any) -> dict[str, Any]:
    return {"name": "support", "base": IDENTITY, "method": Lora(rank=4, alpha=8.0, targets=TARGETS), **over}


@pytest.fixture
def saved(tmp_path: Path) -> Delta:
    return save_delta(tmp_path / "d", lora_tensors(tiny()), fields(metrics={"eval_loss": 1.5}), peft_config())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(16)[None]).logits


def by_hand(model: LlamaForCausalLM, tensors: dict[str, torch.Tensor], scale: float) -> LlamaForCausalLM:
    with torch.no_grad():
        for name, a_RI in tensors.items():
            if name.endswith(".lora_A.weight"):
                b_OR = tensors[name.replace("lora_A", "lora_B")]
                model.get_submodule(name.removesuffix(".lora_A.weight")).weight += scale * b_OR @ a_RI
    return model


def test_plain_peft_loads_it_with_equal_logits(saved: Delta) -> None:
    theirs = PeftModel.from_pretrained(tiny(), saved.path)
    expected = logits(by_hand(tiny(), saved.tensors, 2.0))
    assert (logits(tiny()) - expected).abs().max() > 0.01
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)


def test_round_trip_keeps_tensors_manifest_and_hash(saved: Delta) -> None:
    loaded = load_delta(saved.path)
    assert loaded.manifest == saved.manifest
    assert loaded.manifest is not None
    assert loaded.manifest.sha256 == loaded.sha256 == delta_hash(saved.path)
    assert loaded.sha256 == hashlib.sha256((saved.path / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert loaded.manifest.parameters == sum(t.numel() for t in saved.tensors.values())
    assert loaded.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(loaded.tensors[k], v) for k, v in saved.tensors.items())
    assert loaded.manifest.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_same_tensors_give_the_same_hash(saved: Delta, tmp_path: Path) -> None:
    again = dict(reversed(saved.tensors.items()))
    assert save_delta(tmp_path / "e", again, fields(), peft_config()).sha256 == saved.sha256


def test_model_card_names_base_licence_metrics(saved: Delta) -> None:
    text = (saved.path / "README.md").read_text()
    assert text.startswith("---\n")
    for part in ('base_model: "tiny"', 'license: "mit"', "eval_loss", "1.5", IDENTITY.source_hash, "rank = 4"):
        assert part in text


def test_model_saved_by_peft_loads_without_manifest(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "p")
    loaded = load_delta(tmp_path / "p")
    assert loaded.manifest is None
    assert loaded.tensors["model.layers.1.mlp.down_proj.lora_A.weight"].shape == (4, 48)
    assert "no manifest" in check_base(None, IDENTITY)[0]


def damage(path: Path, how: str) -> None:
    weights = path / "adapter_model.safetensors"
    content = weights.read_bytes()
    header = int.from_bytes(content[:8], "little")
    parsed = json.loads(content[8 : 8 + header])
    first = sorted(parsed)[1]
    if how == "cut":
        weights.write_bytes(content[:-100])
    elif how == "stub":
        weights.write_bytes(content[:5])
    elif how == "long":
        weights.write_bytes(content + b"more")
    elif how == "huge header":
        weights.write_bytes((2**50).to_bytes(8, "little") + content[8:])
    elif how == "no json":
        weights.write_bytes(content[:8] + b"x" * header + content[8 + header :])
    elif how in ("overlap", "shape", "dtype"):
        if how == "overlap":
            parsed[first]["data_offsets"] = [n + 4 for n in parsed[first]["data_offsets"]]
        if how == "shape":
            parsed[first]["shape"] = [-1, 4]
        if how == "dtype":
            parsed[first]["dtype"] = "OBJECT"
        text = json.dumps(parsed).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + header :])
    elif how == "bit":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "gone":
        weights.unlink()
    elif how == "config json":
        (path / "adapter_config.json").write_text("{")
    elif how == "config gone":
        (path / "adapter_config.json").unlink()
    elif how == "no type":
        (path / "adapter_config.json").write_text("{}")
    elif how == "rank":
        (path / "adapter_config.json").write_text(json.dumps(peft_config(r=5)))
    elif how == "manifest":
        (path / "manta.json").write_text('{"name": "../x"}')


@pytest.mark.parametrize(
    ("how", "named", "reason"),
    [
        ("cut", "adapter_model.safetensors", "sha256"),
        ("bit", "adapter_model.safetensors", "sha256"),
        ("gone", "d", "no adapter_model.safetensors"),
        ("config json", "adapter_config.json", "not JSON"),
        ("config gone", "d", "no adapter_config.json"),
        ("no type", "adapter_config.json", "peft_type"),
        ("rank", "adapter_model.safetensors", "rank 4"),
        ("manifest", "manta.json", "not a manifest"),
    ],
)
def test_damaged_folder_is_one_clear_error(saved: Delta, how: str, named: str, reason: str) -> None:
    damage(saved.path, how)
    with pytest.raises(DeltaError) as caught:
        load_delta(saved.path)
    assert named in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut", "truncated"),
        ("stub", "truncated"),
        ("long", "corrupt"),
        ("huge header", "not a safetensors file"),
        ("no json", "not JSON"),
        ("overlap", "overlap or leave holes"),
        ("shape", "makes no sense"),
        ("dtype", "makes no sense"),
    ],
)
def test_damaged_plain_folder_says_why(saved: Delta, how: str, reason: str) -> None:
    (saved.path / "manta.json").unlink()
    damage(saved.path, how)
    with pytest.raises(DeltaError, match=reason) as caught:
        load_delta(saved.path)
    assert "adapter_model.safetensors" in str(caught.value)


def test_pickled_weights_are_refused_with_the_way_out(saved: Delta) -> None:
    (saved.path / "adapter_model.safetensors").rename(saved.path / "adapter_model.bin")
    with pytest.raises(DeltaError, match=r"adapter_model.bin: pickled weights can run code.*safe_serialization"):
        load_delta(saved.path)


def test_oversized_files_are_not_read(saved: Delta) -> None:
    with pytest.raises(DeltaError, match="over the limit of 1,000"):
        load_delta(saved.path, max_bytes=1000)
    (saved.path / "adapter_config.json").write_text(" " * (5 * 2**20))
    with pytest.raises(DeltaError, match=r"adapter_config.json.*over the limit"):
        load_delta(saved.path)


def test_links_must_stay_inside(saved: Delta, tmp_path: Path) -> None:
    weights = saved.path / "adapter_model.safetensors"
    shutil.move(weights, tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeltaError, match="leaves the folder"):
        load_delta(saved.path)
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(DeltaError, match="leads nowhere"):
        load_delta(saved.path)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(DeltaError, match="not a plain file"):
        load_delta(saved.path)


def test_links_of_the_hub_cache_are_followed(saved: Delta, tmp_path: Path) -> None:
    snapshot = tmp_path / "repo" / "snapshots" / "abc"
    blobs = tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(saved.path.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert load_delta(snapshot).sha256 == saved.sha256


def test_nan_and_odd_tensors_are_refused(tmp_path: Path) -> None:
    tensors = lora_tensors(tiny())
    name = next(iter(tensors))
    bad = save_delta(tmp_path / "n", {**tensors, name: tensors[name] * float("nan")}, None, peft_config())
    with pytest.raises(DeltaError, match=f"{name} holds NaN"):
        load_delta(bad.path)
    assert load_delta(bad.path, finite=False).sha256 == bad.sha256
    for odd, reason in [
        ({name: tensors[name]}, "no lora_B beside"),
        ({**tensors, name: tensors[name][:2]}, "have shapes"),
        ({**tensors, "../x": torch.ones(1)}, "not a path of module names"),
        ({**tensors, "x": torch.ones(0)}, "is empty"),
        ({}, "no tensors"),
    ]:
        with pytest.raises(DeltaError, match=reason):
            save_delta(tmp_path / "o", odd, None, peft_config())
    assert not (tmp_path / "o").exists()
    save_file({"stray": torch.ones(2)}, bad.path / "adapter_model.safetensors")
    with pytest.raises(DeltaError, match="does not start with"):
        load_delta(bad.path)


def test_saving_again_replaces_the_whole_folder(saved: Delta) -> None:
    (saved.path / "stray.txt").write_text("old")
    new = save_delta(saved.path, lora_tensors(tiny(), seed=2), fields(), peft_config())
    assert load_delta(saved.path).sha256 == new.sha256 != saved.sha256
    assert not (saved.path / "stray.txt").exists()
    assert [p.name for p in saved.path.parent.iterdir()] == ["d"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_full_disk_leaves_the_old_delta(saved: Delta, monkeypatch: pytest.MonkeyPatch, code: int, nth: int) -> None:
    real, calls = os.fsync, []

    def failing(fd: int) -> None:
        calls.append(fd)
        if len(calls) == nth:
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DeltaError, match=r"cannot write the delta to .*untouched") as caught:
        save_delta(saved.path, lora_tensors(tiny(), seed=2), fields(), peft_config())
    monkeypatch.undo()
    assert ("no space left" in str(caught.value)) == (code == errno.ENOSPC)
    assert load_delta(saved.path).sha256 == saved.sha256
    assert [p.name for p in saved.path.parent.iterdir()] == ["d"]


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_delta(saved: Delta) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.delta import load_delta, save_delta\n"
        f"d = load_delta({str(saved.path)!r}); print('ready', flush=True)\n"
        "while True: save_delta(d.path, {k: v + 1 for k, v in d.tensors.items()}, d.manifest, d.peft_config)"
    )
    for wait in (0.0, 0.011, 0.023, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(wait)
        process.kill()
        process.wait()
        process.stdout.close()
        assert load_delta(saved.path).manifest is not None


def test_without_atomic_exchange_the_folder_is_still_replaced(saved: Delta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    new = save_delta(saved.path, lora_tensors(tiny(), seed=2), fields(), peft_config())
    assert load_delta(saved.path).sha256 == new.sha256
    assert [p.name for p in saved.path.parent.iterdir()] == ["d"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("mine")
    with pytest.raises(DeltaError, match="in the way"):
        save_delta(tmp_path / "d", lora_tensors(tiny()), None, peft_config())
    assert (tmp_path / "d").read_text() == "mine"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DeltaError, match="left alone"):
        save_delta(tmp_path, lora_tensors(tiny()), None, peft_config())
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_tensor_files_round_trip_and_are_replaced_whole(tmp_path: Path) -> None:
    tensors = {"step": torch.tensor(7), "m.x": torch.randn(3, 5, dtype=torch.bfloat16)}
    digest = write_tensors(tmp_path / "t.safetensors", tensors)
    assert digest == delta_hash(tmp_path / "t.safetensors")
    back, theirs = read_tensors(tmp_path / "t.safetensors"), load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(back[k], tensors[k]) and torch.equal(theirs[k], tensors[k]) for k in tensors)
    with pytest.raises(DeltaError, match="over the limit"):
        write_tensors(tmp_path / "t.safetensors", {"x": torch.ones(100)}, max_bytes=10)
    assert delta_hash(tmp_path / "t.safetensors") == digest
    with pytest.raises(DeltaError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")


def test_wrong_base_names_both_hashes_and_recipe_only_warns() -> None:
    manifest = new_manifest(**fields())
    assert check_base(manifest, IDENTITY) == []
    other = IDENTITY.model_copy(update={"source_hash": "b" * 64})
    with pytest.raises(WrongBaseError) as caught:
        check_base(manifest, other)
    assert "a" * 64 in str(caught.value)
    assert "b" * 64 in str(caught.value)
    changed = IDENTITY.model_copy(update={"recipe": "nf4-double/bf16", "template_hash": "d" * 64})
    recipe, template = check_base(manifest, changed)
    assert "none/fp32" in recipe
    assert "nf4-double/bf16" in recipe
    assert "chat template" in template


def test_bad_names_do_not_reach_a_manifest() -> None:
    for name in ("../x", "A", "", "a/b", "x" * 64, ".hidden"):
        with pytest.raises(DeltaError, match="name"):
            new_manifest(**fields(name=name))


def test_credentials_are_masked() -> None:
    assert redact("at https://me:s3cret@host/x?token=abc&y=1") == "at https://***@host/x?token=***&y=1"
    assert redact("postgresql+psycopg2://u:p@ss@db/x") == "postgresql+psycopg2://***@db/x"
    assert redact("models:/a@champion http://host/a@b") == "models:/a@champion http://host/a@b"
    tree = redacted({"a": {"api_key": "x", "hf_token": "y", "max_tokens": 5, "uri": ["http://u:p@h"]}})
    assert tree == {"a": {"api_key": "***", "hf_token": "***", "max_tokens": 5, "uri": ["http://***@h"]}}
    run = new_manifest(**fields(run={"tracking": {"uri": "http://u:p@h"}})).run
    assert run == {"tracking": {"uri": "http://***@h"}}
