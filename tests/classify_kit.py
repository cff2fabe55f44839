"""What the tests of classification share: labelled texts, what transformers says of them, slots with heads."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from orchestrator.base import dense_weight, load_base
from orchestrator.base.linear import NF4Linear
from orchestrator.base.model import bare
from orchestrator.config import Base, Classification, Zero
from orchestrator.data import Sample
from orchestrator.methods import Bank
from orchestrator.train.classify import Classifier
from orchestrator.train.engine import Engine
from orchestrator.train.step import Layout, Stepper
from tests import tiny

ANIMALS, PLACES = ("cat", "cow", "dog"), ("mat", "house", "barn", "sea")
RECORDS = [
    {"text": f"the {a} sat on the {p} again" * (n % 3 + 1), "label": a}
    for n, (a, p) in enumerate([(a, p) for a in ANIMALS for p in PLACES])
]
DECODERS = ("llama", "qwen3", "gpt2")
HEAD = {True: "classifier", False: "score"}
"""Where the head of an encoder or a decoder is."""
CLASSIFY = ("task=classification", "train.batch_size=12", "train.warmup=0")


def save_bases(folder: Path) -> dict[str, Path]:
    return {name: tiny.save(folder / name, name) for name in (*tiny.ENCODERS, *DECODERS)}


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


class Slots:
    """Some slots on one base, and what runs them."""

    def __init__(
        self,
        folder: Path,
        slots: dict[int, tuple[Any, Classification]],
        *,
        quantize: str = "none",
        trained: bool = True,
    ) -> None:
        arch = json.loads((folder / "config.json").read_text())["model_type"]
        encoder = arch in tiny.ENCODERS
        loaded = load_base(Base(id=str(folder), quantize=quantize), encoder=encoder)
        self.bank = Bank(loaded.model, base_id=str(folder))
        self.model = bare(loaded.model)
        for slot, (knobs, task) in slots.items():
            self.bank.add(slot, knobs, seed=slot, task=task)
            generator = torch.Generator().manual_seed(slot)
            for parameter in self.bank.parameters(slot).values() if trained else ():
                parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        self.classifier = Classifier(self.bank, encoder=encoder, packed=True)
        engine = Engine(Zero(stage=0), stage=0, device=torch.device("cpu"), dtype=torch.float32)
        layout = Layout(length=64, rows_per_pass=3, packing=True, pad_id=0)
        self.stepper = Stepper(self.model, self.bank, engine, self.classifier, layout)

    def step(self, data: dict[int, list[Sample]]) -> tuple[dict[int, float], dict[int, dict[str, Tensor]]]:
        losses = self.stepper.train(data, dict.fromkeys(data, 3))
        grads = {s: {n: p.grad.clone() for n, p in self.bank.parameters(s).items()} for s in data}
        return losses, grads


def samples(records: list[dict[str, Any]], labels: tuple[str, ...], *, encoder: bool) -> list[Sample]:
    read = tiny.tokenizer(encoder=encoder)
    made = [(read(r["text"])["input_ids"], labels.index(r["label"])) for r in records]
    return [Sample(t, [False] * len(t), key, label) for key, (t, label) in enumerate(made)]
