"""What the tests of single methods share: tiny bases, slots with values, deltas on disk, one slot alone."""

from pathlib import Path
from typing import Any

import torch

from orchestrator.base import load_base, source_identity
from orchestrator.config import Base, CausalLM
from orchestrator.delta import Delta, load_delta, new_manifest, save_delta
from orchestrator.methods import Bank, from_files, knobs_from_peft, to_files
from tests import tiny

TOKENS_BT = torch.randint(3, tiny.VOCAB, (5, 16), generator=torch.Generator().manual_seed(1))


def forward(model: Any, tokens_BT: torch.Tensor = TOKENS_BT) -> torch.Tensor:
    return model(input_ids=tokens_BT, use_cache=False).logits


def base_of(folder: Path, quantize: str = "none") -> Any:
    return load_base(Base(id=str(folder), quantize=quantize)).model


def moved(bank: Bank, slot: int, seed: int = 0, by: float = 0.1) -> None:
    """Give a slot values that change something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters(slot).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * by


def banked(folder: Path, knobs: Any, quantize: str = "none", **options: Any) -> tuple[Any, Bank]:
    """A base with a trained slot 0."""
    model = base_of(folder, quantize)
    bank = Bank(model, base_id=str(folder))
    bank.add(0, knobs, **options)
    moved(bank, 0)
    return model, bank


def passed(model: Any, bank: Bank, slot_B: list[int] | None = None) -> torch.Tensor:
    """Logits, each row through its slot, default 0."""
    slots = torch.tensor(slot_B or [0] * len(TOKENS_BT)).unsqueeze(1).expand(TOKENS_BT.shape)
    with bank.routed(slots):
        return forward(model)


def gradients(model: Any, bank: Bank) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of slot 0 and the gradients of their mean square."""
    logits = passed(model, bank)
    logits.square().mean().backward()
    bank.hand_out_gradients()
    assert all(p.grad is None for p in model.parameters())
    return logits, {name: p.grad for name, p in bank.parameters(0).items()}


def saved(bank: Bank, folder: Path, base: Path, *, plain: bool = False) -> Delta:
    """Slot 0 as a delta folder, with a manifest or as peft would write it; read back."""
    knobs = bank.knobs(0)
    files, config = to_files(knobs, CausalLM(), bank.tensors(0), bank.sites(0), bank.scope)
    manifest = None
    if not plain:
        identity = source_identity(Base(id=str(base)))
        manifest = new_manifest(name="x", base=identity, method=knobs, task=CausalLM(), data_digest="0" * 64)
    save_delta(folder, files, manifest, config)
    return load_delta(folder)


def reloaded(delta: Delta, base: Path, quantize: str = "none") -> tuple[Any, Bank]:
    """A fresh base with a delta from disk in slot 0."""
    model = base_of(base, quantize)
    bank = Bank(model)
    knobs = delta.manifest.method if delta.manifest else knobs_from_peft(delta.peft_config)
    bank.add(0, knobs, tensors=from_files(knobs, CausalLM(), delta.tensors, bank.scope))
    return model, bank
