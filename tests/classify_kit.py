"""What the tests of classification share: labelled texts, and what transformers itself says of them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from orchestrator.base import dense_weight, load_base
from orchestrator.base.linear import NF4Linear
from orchestrator.config import Base
from tests import tiny

ANIMALS, PLACES = ("cat", "cow", "dog"), ("mat", "house", "barn", "sea")
RECORDS = [
    {"text": f"the {a} sat on the {p} again" * (n % 3 + 1), "label": a}
    for n, (a, p) in enumerate([(a, p) for a in ANIMALS for p in PLACES])
]
CLASSIFY = ("task=classification", "train.batch_size=12", "train.warmup=0")


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def transformer(folder: str | Path, *, quantize: str = "none") -> Any:
    """transformers' own model without a head, one text at a time; with the weights that an NF4 base stands for."""
    arch = json.loads(Path(folder, "config.json").read_text())["model_type"]
    kind = AutoModel if arch in tiny.ENCODERS else AutoModelForCausalLM
    theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
    if quantize == "nf4":
        ours = load_base(Base(id=str(folder), quantize="nf4"), encoder=arch in tiny.ENCODERS).model
        for name, module in ours.named_modules():
            if isinstance(module, NF4Linear):
                weight_OI = dense_weight(module)
                theirs.get_submodule(name).weight.data.copy_(weight_OI.T if module.transposed else weight_OI)
    return theirs.base_model


def pooled(theirs: Any, text: str, pooling: str, *, encoder: bool) -> Tensor:
    """What a head sees of a text, [1, H]."""
    tokens_1T = torch.tensor([tiny.tokenizer(encoder=encoder)(text)["input_ids"]])
    with torch.no_grad():
        out = theirs(input_ids=tokens_1T)
    if pooling == "pooler":
        return out.pooler_output
    h_TH = out.last_hidden_state[0]
    return {"last": h_TH[-1:], "first": h_TH[:1], "mean": h_TH.mean(0, keepdim=True)}[pooling]
