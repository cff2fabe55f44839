"""What a model shows of itself before the first step decides how it is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, GraniteConfig

from orchestrator.base import load_base
from orchestrator.config import Base, Lora
from orchestrator.config.method import Bottleneck, Prefix, Prompt
from orchestrator.errors import MethodError
from orchestrator.methods import Bank
from orchestrator.train.probe import probe
from tests import tiny

ODD: dict[str, Any] = {
    # ALiBi and no positions: packed sequences see each other.
    "bloom": BloomConfig(vocab_size=tiny.VOCAB, hidden_size=64, n_layer=2, n_head=4),
    # The logits are divided after the head.
    "granite": GraniteConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
    ),
}


@pytest.mark.parametrize(
    ("arch", "packs", "in_head"),
    [
        ("llama", True, True),
        ("gpt2", True, True),
        ("gemma3", True, True),
        ("bloom", False, True),
        ("granite", True, False),
    ],
)
def test_a_model_that_mixes_packed_sequences_or_scales_its_logits_is_found_out(
    arch: str, packs: bool, in_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arch in ODD:
        monkeypatch.setitem(tiny.CONFIGS, arch, ODD[arch])
    base = load_base(Base(id=str(tiny.save(tmp_path, arch)), quantize="none"))
    bank = Bank(base.model)
    bank.add(0, Lora(rank=2))
    found = probe(base.model, bank, 0, torch.device("cpu"), quantized=False, vocabulary=tiny.VOCAB)
    assert (found.packs, found.in_head, found.gathered_alive) == (packs, in_head, 0)
    assert all(leaf.grad is None for leaf in bank.leaves().values())


@pytest.mark.parametrize("knobs", [Prompt(tokens=3), Prefix(tokens=3, std=1.0), Bottleneck(placement="parallel")])
@pytest.mark.parametrize(("arch", "packs"), [("llama", True), ("gpt2", True), ("bloom", False)])
def test_what_a_delta_puts_first_is_part_of_the_look(
    arch: str, packs: bool, knobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.CONFIGS, "bloom", ODD["bloom"])
    base = load_base(Base(id=str(tiny.save(tmp_path, arch)), quantize="none"))
    bank = Bank(base.model)
    if arch == "bloom" and knobs.type == "prefix":
        with pytest.raises(MethodError, match="attention of its own kind"):
            bank.add(0, knobs)
        return
    bank.add(0, knobs)
    found = probe(base.model, bank, 0, torch.device("cpu"), quantized=False, vocabulary=tiny.VOCAB)
    assert (found.packs, found.in_head) == (packs, True)
    assert all(leaf.grad is None for leaf in bank.leaves().values())
