"""Fisher information of a classification: held against gradients of an untouched transformers model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.base import load_base
from orchestrator.base.model import bare
from orchestrator.config import Base, Classification, Sparse, Zero
from orchestrator.data import Sample
from orchestrator.methods import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.fisher import first_loss, fisher
from tests import tiny
from tests.classify_kit import ANIMALS, CLASSIFY, HEAD, RECORDS, samples, transformer, write
from tests.launch_kit import small, train_here

KNOBS = Sparse(density=0.02, choose="fisher")


class Texts:
    """A source of labelled texts."""

    def __init__(self, texts: list[Sample]) -> None:
        self.texts, self.at = texts, 0

    def take(self, n: int) -> list[Sample]:
        self.at += n
        return self.texts[self.at - n : self.at]

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("arch", ["llama", "bert", "deberta-v2"])
def test_it_is_the_mean_square_of_each_texts_gradients(arch: str, tmp_path: Path) -> None:
    folder, encoder, task = tiny.save(tmp_path / arch, arch), arch != "llama", Classification(labels=ANIMALS)
    texts = samples(RECORDS[::4], ANIMALS, encoder=encoder)
    assert len({text.label for text in texts}) == 3
    model = load_base(Base(id=str(folder), quantize="none"), encoder=encoder).model
    bank = Bank(model)
    engine, sites = Engine(Zero(), stage=0, device=torch.device("cpu"), dtype=torch.float32), list(bank.scope.linears)
    with first_loss(bank, bare(model), KNOBS, task, seed=4, encoder=encoder) as loss:
        found = fisher(model, engine, loss, Texts(texts), sites=sites, scope=bank.scope, count=3)
    assert bank.slots == ()
    bank.add(0, KNOBS, seed=4, task=task, importance=found)  # as the run will have it
    tensors, head = bank.tensors(0), HEAD[encoder]

    theirs = transformer(folder)
    weights = [theirs.get_submodule(site.removeprefix("model.")).weight for site in sites]
    squares = [torch.zeros_like(weight) for weight in weights]
    for text in texts:
        h_TH = theirs(input_ids=torch.tensor([text.tokens])).last_hidden_state[0]
        pooled_H = h_TH.mean(0) if encoder else h_TH[-1]
        logits_C = nn.functional.linear(pooled_H, tensors[f"{head}.weight"], tensors.get(f"{head}.bias"))
        grads = torch.autograd.grad(nn.functional.cross_entropy(logits_C, torch.tensor(text.label)), weights)
        for square, grad in zip(squares, grads, strict=True):
            square += grad**2 / 3
    for site, square in zip(sites, squares, strict=True):
        torch.testing.assert_close(found[site], square, rtol=1e-3, atol=1e-9)
        chosen = torch.zeros(square.numel(), dtype=torch.bool)
        chosen[tensors[f"{site}.index"].long()] = True
        assert square.flatten()[chosen].min() >= square.flatten()[~chosen].max() * 0.999


@pytest.mark.slow
def test_a_classification_trains_the_weights_that_matter_to_it(tmp_path: Path) -> None:
    folder, data = tiny.save(tmp_path / "base", "bert"), write(tmp_path / "train.jsonl")
    method = "method={type: sparse, choose: fisher, fisher_samples: 6, density: 0.2}"
    run = small(f"base={folder}", f"data={data}", *CLASSIFY, method, "train.lr=0.0005", "train.steps=4")
    losses = train_here(run, tmp_path / "out").of("step", "loss")
    assert losses[-1] < losses[0]
