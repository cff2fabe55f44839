"""A delta as a LoRA: exact where its rank allows, else with the error that numpy finds, too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from orchestrator.approximate import approximated
from orchestrator.base import load_base, source_identity
from orchestrator.config import Base, CausalLM, LastLayers, Lora
from orchestrator.delta import Delta, load_delta, save_delta
from orchestrator.errors import DeltaError, MethodError, WrongBaseError
from orchestrator.methods import METHODS, Bank, to_files
from orchestrator.methods.lora import LoRA
from tests import tiny
from tests.methods_kit import CASES, NO_WEIGHT_CHANGE

TOKENS_BT = torch.randint(3, tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def trained(folder: Path, knobs: Any, out: Path) -> tuple[Delta, Tensor]:
    """A delta of random values on the dense base, and the logits that it makes there."""
    base = Base(id=str(folder), quantize="none")
    model = load_base(base).model
    bank = Bank(model, base_id=str(folder), encode=tiny.tokenizer().encode)
    bank.add(0, knobs, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in bank.parameters(0).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    position_BT = torch.arange(TOKENS_BT.shape[1]).expand(TOKENS_BT.shape)
    with bank.routed(torch.zeros_like(TOKENS_BT), position_BT=position_BT), torch.no_grad():
        logits = model(input_ids=TOKENS_BT, use_cache=False).logits
    files, config = to_files(knobs, CausalLM(), bank.tensors(0), bank.sites(0), bank.scope)
    manifest = {"name": "one", "base": source_identity(base), "method": knobs}
    return save_delta(out, files, manifest, config), logits


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def in_peft(folder: Path, delta: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(plain(folder), delta).eval()(input_ids=TOKENS_BT).logits


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("knobs", "rank"),
    [
        (Lora(rank=4, alpha=8), 4),
        (Lora(rank=4, rslora=True, ranks={r".*\.0\..*": 2}), 6),
        (Lora(rank=3, alpha=5, start="pissa"), 6),
    ],
    ids=["lora", "ranks", "pissa"],
)
def test_what_the_rank_holds_is_exact(knobs: Lora, rank: int, arch: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base", arch)
    delta, logits = trained(folder, knobs, tmp_path / "delta")
    found = approximated(delta, folder, tmp_path / "lora", rank=rank)
    assert found.worst[1] < 1e-5
    assert found.total < 1e-5
    assert found.left_out == []
    torch.testing.assert_close(in_peft(folder, tmp_path / "lora"), logits, rtol=1e-5, atol=5e-5)
    made = load_delta(tmp_path / "lora").manifest
    assert (made.method.rank, made.parent, made.tags["approximates"]) == (rank, delta.sha256, "lora")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_error_is_numpys(arch: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base", arch)
    delta, logits = trained(folder, Lora(rank=4, alpha=8, dora=True), tmp_path / "delta")
    model = plain(folder)
    merged = PeftModel.from_pretrained(plain(folder), delta.path).merge_and_unload()
    singular = {}
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2:
            change = (merged.get_submodule(name).weight - module.weight).detach().double().numpy()
            if np.abs(change).max() > 0:
                singular[name] = np.linalg.svd(change, compute_uv=False)
    last = 1.0
    for rank in (2, 8, 32):
        found = approximated(delta, folder, tmp_path / f"lora-{rank}", rank=rank)
        rest = {site: (s[rank:] ** 2).sum() for site, s in singular.items()}
        whole = {site: (s**2).sum() for site, s in singular.items()}
        wanted = {site: (rest[site] / whole[site]) ** 0.5 for site in singular}
        assert found.errors == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        assert found.mean == pytest.approx(np.mean(list(wanted.values())), rel=1e-3)
        assert found.worst[0] == max(wanted, key=lambda site: wanted[site])
        assert found.worst[1] == pytest.approx(max(wanted.values()), rel=1e-3)
        assert found.total == pytest.approx((sum(rest.values()) / sum(whole.values())) ** 0.5, rel=1e-3)
        assert found.total < last
        last = found.total
    whole_rank = approximated(delta, folder, tmp_path / "whole", rank=300)  # more than any layer has
    assert whole_rank.total < 1e-5
    torch.testing.assert_close(in_peft(folder, tmp_path / "whole"), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_dense_changes_are_cut_to_the_rank(arch: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base", arch)
    delta, _ = trained(folder, LastLayers(layers=1), tmp_path / "delta")
    found = approximated(delta, folder, tmp_path / "lora", rank=8)
    for site, error in found.errors.items():
        s = np.linalg.svd(delta.tensors[f"{site}.weight"].double().numpy(), compute_uv=False)
        assert error == pytest.approx(((s[8:] ** 2).sum() / (s**2).sum()) ** 0.5, rel=1e-3)
    assert {f"{site}.weight" for site in found.errors} | set(found.left_out) == set(delta.tensors)
    # Norms and biases, and nothing else, are left out.
    kinds = {name.rsplit(".", 2)[-2:][0] for name in found.left_out if name.endswith(".weight")}
    assert kinds == (
        {"ln_1", "ln_2", "ln_f"} if arch == "gpt2" else {"input_layernorm", "post_attention_layernorm", "norm"}
    )
    assert any(name.endswith(".bias") for name in found.left_out) == (arch == "gpt2")


@pytest.mark.parametrize("case", CASES)
def test_every_method_is_cut_to_a_lora_or_refused(case: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "base")
    delta, _ = trained(folder, CASES[case], tmp_path / "delta")
    refused = dict.fromkeys(NO_WEIGHT_CHANGE, "is no change of weights")
    refused |= dict.fromkeys(("bitfit", "norms"), "changes no linear layer's weight")
    if case in refused:
        with pytest.raises(MethodError, match=refused[case]):
            approximated(delta, folder, tmp_path / "lora", rank=64)
        return
    found = approximated(delta, folder, tmp_path / "lora", rank=64)
    assert found.total < 1e-5  # no layer of the tiny base has a higher rank
    merged = approximated(load_delta(tmp_path / "lora"), folder, tmp_path / "again", rank=64)
    assert merged.total < 1e-5
    assert merged.errors.keys() == found.errors.keys()


class Biased(LoRA):
    """LoRA that moves a bias as well; or nothing but a bias; or no weight at all."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def weight_change(
        self, knobs: Any, site: str, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        change = super().weight_change(knobs, site, tensors, base)
        assert change is not None
        bias = {"bias": change["weight"].sum(1)}
        return {"both": {**change, **bias}, "bias": bias, "none": None}[self.kind]


def test_what_no_lora_can_have_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save(tmp_path / "base")
    delta, _ = trained(folder, Lora(rank=2, targets=("q_proj",)), tmp_path / "delta")
    monkeypatch.setitem(METHODS, "lora", Biased("both"))
    found = approximated(delta, folder, tmp_path / "lora", rank=2)
    assert found.left_out == [f"model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)]
    monkeypatch.setitem(METHODS, "lora", Biased("bias"))
    with pytest.raises(MethodError, match=r"changes no linear layer's weight here \(model.layers.0"):
        approximated(delta, folder, tmp_path / "other", rank=2)
    monkeypatch.setitem(METHODS, "lora", Biased("none"))
    with pytest.raises(MethodError, match="the method lora is no change of weights"):
        approximated(delta, folder, tmp_path / "other", rank=2)
    assert not (tmp_path / "other").exists()


def test_it_refuses_another_base_and_a_taken_folder(tmp_path: Path) -> None:
    delta, _ = trained(tiny.save(tmp_path / "base"), Lora(rank=2, targets=("q_proj",)), tmp_path / "delta")
    with pytest.raises(WrongBaseError):
        approximated(delta, tiny.save(tmp_path / "other", seed=1), tmp_path / "lora", rank=2)
    with pytest.raises(DeltaError, match="exists already"):
        approximated(delta, tmp_path / "base", tmp_path / "base", rank=2)
