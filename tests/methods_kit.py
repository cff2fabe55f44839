"""Every method at sizes for tiny bases, and what the tests of methods share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.base import load_base
from orchestrator.config import IA3, Base, BitFit, Bottleneck, Full, LastLayers, Lora, Norms, Prefix, Prompt, Sparse
from orchestrator.methods import Bank, method_of
from tests import tiny

CASES: dict[str, Any] = {
    "lora": Lora(rank=4, alpha=8),
    "lora_some": Lora(rank=8, alpha=4, rslora=True, targets=("q_proj", "v_proj")),
    "lora_ranks": Lora(rank=2, alpha=16, ranks={"down_proj": 5}, alphas={"o_proj": 3.0}),
    "dora": Lora(rank=3, alpha=6, dora=True),
    "pissa": Lora(rank=4, alpha=4, start="pissa"),
    "last_layers": LastLayers(layers=1),
    "last_layers_head": LastLayers(layers=2, head=True),
    "full": Full(),
    "bitfit": BitFit(),
    "sparse": Sparse(density=0.05),
    "sparse_random": Sparse(density=0.01, choose="random", targets=("q_proj", "up_proj")),
    "norms": Norms(),
    "ia3": IA3(),
    "prompt": Prompt(tokens=5),
    "prompt_text": Prompt(tokens=3, start="text", text="the cat sat on the mat"),
    "prefix": Prefix(tokens=4),
    "prefix_short": Prefix(tokens=2, std=0.5),
    "houlsby": Bottleneck(size=6, placement="houlsby"),
    "pfeiffer": Bottleneck(size=3, activation="gelu"),
    "parallel": Bottleneck(size=5, placement="parallel", activation="silu", scale=2.0),
}
"""Name -> knobs that fit the tiny Llama."""
TRAINED = {
    "lora": 2 * 4 * 1024,
    "lora_some": 2 * 8 * (128 + 96),
    "lora_ranks": 2 * (2 * 832 + 5 * 192),
    "dora": 2 * (3 * 1024 + 512),
    "pissa": 2 * 4 * 1024,
    "last_layers": 36864 + 3 * 64,
    "last_layers_head": 2 * 36864 + 5 * 64 + 320 * 64,
    "full": 2 * 36864 + 5 * 64 + 2 * 320 * 64,
    "bitfit": 2 * 512,
    "sparse": 2 * (2 * 205 + 2 * 102 + 3 * 410),
    "sparse_random": 2 * (41 + 82),
    "norms": 5 * 64,
    "ia3": 2 * (32 + 32 + 128),
    "prompt": 5 * 64,
    "prompt_text": 3 * 64,
    "prefix": 2 * 2 * 4 * 32,
    "prefix_short": 2 * 2 * 2 * 32,
    "houlsby": 2 * 2 * (6 * 128 + 6 + 64),
    "pfeiffer": 2 * (3 * 128 + 3 + 64),
    "parallel": 2 * (5 * 128 + 5 + 64),
}
"""Name -> trained numbers by the papers' formulas: two layers, of 36,864 weights, 512 outputs, 1,024 with inputs."""
NO_WEIGHT_CHANGE = {"prompt", "prompt_text", "prefix", "prefix_short", "houlsby", "pfeiffer", "parallel"}
"""Cases that cannot be merged."""
TOKENS_BT = torch.randint(3, tiny.VOCAB, (4, 16), generator=torch.Generator().manual_seed(1))


def packable() -> dict[str, Any]:
    """The cases that share a base with others."""
    return {name: knobs for name, knobs in CASES.items() if method_of(knobs).packs}


def mixed() -> list[Any]:
    """What one batch mixes: the packable cases, and a second slot of each kind of kernel that has one case."""
    more = [Lora(rank=2, alpha=3, dora=True), Norms(), Bottleneck(size=5, activation="gelu", scale=0.7)]
    return [*packable().values(), *more]


def loaded(folder: Path, quantize: str) -> Any:
    """The model, dense or quantized."""
    return load_base(Base(id=str(folder), quantize=quantize)).model


def bank_of(model: Any, source: Any = None, *, fuse: bool = False) -> Bank:
    """A bank that can read texts."""
    encode = tiny.tokenizer().encode
    return Bank(
        model,
        base_id="tiny",
        source=source,
        encode=lambda text: encode(text, add_special_tokens=False),
        fuse=fuse,
    )


def shake(bank: Bank, slot: int, seed: int = 0, size: float = 0.1) -> None:
    """Give what is trained values that change something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters(slot).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * size


def forward(model: Any, bank: Bank | None, slot_B: list[int], tokens_BT: Tensor = TOKENS_BT) -> Tensor:
    """Logits of each row's own tokens, each row of one slot; slots with virtual tokens among them."""
    leads = [bank.lead(s) if bank and s >= 0 else (0, 0) for s in slot_B]
    most = max(virtual for virtual, _ in leads)
    rows, positions = [], []
    for tokens_T, (virtual, offset) in zip(tokens_BT, leads, strict=True):
        rows.append([0] * virtual + tokens_T.tolist() + [0] * (most - virtual))
        positions.append(list(range(offset, offset + len(tokens_T) + most)))
    token_BT, position_BT = torch.tensor(rows), torch.tensor(positions)
    slot_BT = torch.tensor(slot_B).unsqueeze(1).expand_as(token_BT)
    if bank is None:
        logits = model(input_ids=token_BT, position_ids=position_BT, use_cache=False).logits
    else:
        with bank.routed(slot_BT, position_BT=position_BT):
            logits = model(input_ids=token_BT, position_ids=position_BT, use_cache=False).logits
    return torch.stack(
        [row[virtual : virtual + tokens_BT.shape[1]] for row, (virtual, _) in zip(logits, leads, strict=True)]
    )


def own(tensors: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
    """The tensors of one site."""
    return {n.removeprefix(f"{site}."): t for n, t in tensors.items() if n.startswith(f"{site}.")}
