"""Classification: transformers' and peft's own models say the same; slots keep their labels and their passes apart."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from orchestrator.base import load_base
from orchestrator.base.model import bare
from orchestrator.config import Base, Classification, Lora, Zero
from orchestrator.data import Sample
from orchestrator.errors import BaseModelError, MethodError
from orchestrator.methods import Bank, from_files, task_from_peft, to_files
from orchestrator.train.classify import Classifier, predict
from orchestrator.train.engine import Engine
from orchestrator.train.metrics import classification_metrics
from orchestrator.train.step import Layout, Stepper
from tests import tiny
from tests.classify_kit import ANIMALS, CLASSIFY, RECORDS, pooled, transformer, write
from tests.launch_kit import assert_same_bits, small, train_here, weights

DECODERS = ("llama", "qwen3", "gpt2")
HEAD = {True: "classifier", False: "score"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny.save(folder / name, name) for name in (*tiny.ENCODERS, *DECODERS)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "texts.jsonl")


# ---- the first loss is that of transformers on texts one by one, though ours packs them


@pytest.mark.parametrize(
    ("arch", "packing"),
    [*((arch, True) for arch in (*tiny.ENCODERS, *DECODERS)), ("bert", False), ("deberta-v2", False), ("llama", False)],
)
def test_the_first_loss_is_that_of_transformers(
    arch: str, packing: bool, bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    encoder, pooling = arch in tiny.ENCODERS, "mean" if arch in tiny.ENCODERS else "last"
    more = (f"data.packing={packing}", "train.steps=1", "train.lr=1e-12")
    heard = train_here(small(f"base={bases[arch]}", f"data={texts}", *CLASSIFY, *more), tmp_path)
    assert not heard.of("warning", "text")
    assert heard.latest is not None
    head = weights(heard.latest / "delta" / "delta")
    name = f"base_model.model.{HEAD[encoder]}"
    weight, bias = head[f"{name}.weight"], head.get(f"{name}.bias")
    theirs = transformer(bases[arch], quantize="nf4")
    h_NH = torch.cat([pooled(theirs, r["text"], pooling, encoder=encoder) for r in RECORDS])
    label_N = torch.tensor([ANIMALS.index(r["label"]) for r in RECORDS])
    expected = nn.functional.cross_entropy(nn.functional.linear(h_NH, weight, bias), label_N)
    assert heard.of("step", "loss") == pytest.approx([float(expected)], rel=1e-5)


@pytest.mark.parametrize("pooling", ["last", "first", "mean", "pooler"])
def test_each_pooling_sees_its_part_of_every_text(pooling: str, bases: dict[str, Path]) -> None:
    theirs = transformer(bases["bert"])
    expected = torch.cat([pooled(theirs, r["text"], pooling, encoder=True) for r in RECORDS[:5]])
    slot = Slots(bases["bert"], {0: (Lora(rank=2), Classification(labels=ANIMALS, pooling=pooling))}, trained=False)
    (batch,) = slot.stepper.deal({0: samples(RECORDS[:5], ANIMALS, encoder=True)})
    assert len(batch.tokens_BT) < 5, "some share a row"
    with torch.no_grad(), slot.bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        got = slot.classifier.pool(slot.model, batch)
    in_batch = batch.sample_BT[batch.labels_BT >= 0]
    torch.testing.assert_close(got, expected[in_batch], rtol=1e-5, atol=1e-5)


def test_a_pooler_that_is_not_there_is_missed(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    run = small(f"base={bases['roberta']}", f"data={texts}", *CLASSIFY, "task.pooling=pooler")
    with pytest.raises(BaseModelError, match=r"no trained pooler.*mean"):
        train_here(run, tmp_path)


# ---- slots


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


@pytest.mark.parametrize(
    ("arch", "quantize"),
    [
        *((arch, "none") for arch in ("bert", "roberta", "deberta", "deberta-v2", "llama")),
        ("bert", "nf4"),
        ("llama", "nf4"),
    ],
)
def test_slots_of_different_labels_and_methods_equal_each_alone(
    arch: str, quantize: str, bases: dict[str, Path]
) -> None:
    encoder = arch in tiny.ENCODERS
    five, two = tuple("abcde"), ("no", "yes")
    slots = {
        4: (Lora(rank=4), Classification(labels=ANIMALS)),
        1: (Lora(rank=2, dora=True, dropout=0.2), Classification(labels=five, pooling="first", dropout=0.3)),
        7: (Lora(rank=8, rslora=True), Classification(labels=two, pooling="last")),
    }
    data = {
        4: samples(RECORDS, ANIMALS, encoder=encoder),
        1: samples([{**r, "label": five[i % 5]} for i, r in enumerate(RECORDS[:7])], five, encoder=encoder),
        7: samples([{**r, "label": two[i % 2]} for i, r in enumerate(RECORDS[:4])], two, encoder=encoder),
    }
    losses, grads = Slots(bases[arch], slots, quantize=quantize).step(data)
    for slot, own in slots.items():
        alone, alone_grads = Slots(bases[arch], {slot: own}, quantize=quantize).step({slot: data[slot]})
        assert losses[slot] == pytest.approx(alone[slot], rel=1e-5)
        assert alone_grads[slot].keys() == grads[slot].keys()
        for name, grad in alone_grads[slot].items():
            torch.testing.assert_close(grads[slot][name], grad, rtol=1e-4, atol=1e-5)


def test_predictions_come_in_the_order_of_the_texts(bases: dict[str, Path]) -> None:
    slot = Slots(bases["bert"], {3: (Lora(rank=2), Classification(labels=ANIMALS, pooling="pooler"))})
    said = predict(slot.stepper, slot.classifier, 3, samples(RECORDS, ANIMALS, encoder=True), logits=True)
    for number, record in enumerate(RECORDS):
        alone = predict(slot.stepper, slot.classifier, 3, samples([record], ANIMALS, encoder=True), logits=True)
        assert said.logits_NC is not None
        assert alone.logits_NC is not None
        torch.testing.assert_close(said.logits_NC[number], alone.logits_NC[0], rtol=1e-5, atol=1e-5)
        assert said.loss_N[number] == pytest.approx(float(alone.loss_N[0]), rel=1e-5)
        assert int(said.predicted_N[number]) == int(said.logits_NC[number].argmax())
        assert ANIMALS[said.label_N[number]] == record["label"]


def test_metrics_of_a_confusion_matrix_worked_out_by_hand() -> None:
    # 4 hits, 2 misses, 1 false alarm, 3 rejections
    labels, predicted = [1] * 6 + [0] * 4, [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    found = classification_metrics(labels, predicted)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx((8 / 11 + 6 / 9) / 2)
    assert found["mcc"] == pytest.approx((4 * 3 - 1 * 2) / (5 * 6 * 4 * 5) ** 0.5)
    assert classification_metrics([0, 1], [0, 0])["mcc"] == 0


# ---- peft


def peft_model(folder: Path, **config: Any) -> Any:
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    theirs.config.pad_token_id = 0
    torch.manual_seed(3)
    made = peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **config))
    return made.eval()


def peft_logits(theirs: Any, *, encoder: bool) -> Tensor:
    read = tiny.tokenizer(encoder=encoder)
    with torch.no_grad():
        return torch.cat([theirs(input_ids=torch.tensor([read(r["text"])["input_ids"]])).logits for r in RECORDS])


def our_logits(folder: Path, knobs: Any, task: Classification, tensors: dict[str, Tensor], *, encoder: bool) -> Tensor:
    slot = Slots(folder, {})
    slot.bank.add(0, knobs, task=task, tensors=from_files(knobs, task, tensors, slot.bank.scope))
    said = predict(slot.stepper, slot.classifier, 0, samples(RECORDS, ANIMALS, encoder=encoder), logits=True)
    assert said.logits_NC is not None
    return said.logits_NC


CASES = [
    ("llama", "last", ["q_proj", "down_proj"]),
    ("gpt2", "last", ["c_attn"]),
    ("bert", "pooler", ["query", "intermediate.dense"]),
]


@pytest.mark.parametrize(("arch", "pooling", "targets"), CASES)
def test_peft_loads_our_delta_with_equal_logits(
    arch: str, pooling: str, targets: list[str], bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    encoder = arch in tiny.ENCODERS
    run = small(
        f"base={bases[arch]}",
        "base.quantize=none",
        f"data={texts}",
        *CLASSIFY,
        f"task.pooling={pooling}",
        "train.steps=3",
        f"method.targets=[{','.join(targets)}]",
    )
    heard = train_here(run, tmp_path)
    assert heard.latest is not None
    folder = heard.latest / "delta" / "delta"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", [HEAD[encoder]])
    assert json.loads((folder / "manta.json").read_text())["task"]["labels"] == list(ANIMALS)
    plain = AutoModelForSequenceClassification.from_pretrained(bases[arch], num_labels=3, dtype=torch.float32)
    plain.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    manifest = json.loads((folder / "manta.json").read_text())
    tensors = {n.removeprefix("base_model.model."): t for n, t in weights(folder).items()}
    knobs, task = Lora(**manifest["method"]), Classification(**manifest["task"])
    ours = our_logits(bases[arch], knobs, task, tensors, encoder=encoder)
    torch.testing.assert_close(ours, peft_logits(theirs, encoder=encoder), rtol=1e-5, atol=1e-5)
    assert ours.std(0).min() > 1e-3


@pytest.mark.parametrize(("arch", "pooling", "targets"), CASES)
def test_a_run_goes_on_from_a_classifier_of_peft(
    arch: str, pooling: str, targets: list[str], bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    encoder = arch in tiny.ENCODERS
    theirs = peft_model(bases[arch], r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=arch == "gpt2")
    theirs.save_pretrained(tmp_path / "peft")
    run = small(
        f"base={bases[arch]}",
        "base.quantize=none",
        f"data={texts}",
        *CLASSIFY,
        f"task.labels=[{','.join(ANIMALS)}]",
        "train.steps=1",
        f"train.init_from={tmp_path}/peft",
    )
    heard = train_here(run, tmp_path / "run", start=tmp_path / "peft")
    label_N = torch.tensor([ANIMALS.index(r["label"]) for r in RECORDS])
    expected = nn.functional.cross_entropy(peft_logits(theirs, encoder=encoder), label_N)
    assert heard.of("step", "loss") == pytest.approx([float(expected)], rel=1e-5)
    assert heard.latest is not None
    saved = json.loads((heard.latest / "delta" / "delta" / "manta.json").read_text())
    assert saved["task"]["pooling"] == pooling


def test_a_head_that_cannot_be_taken_over_is_refused(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    theirs = peft_model(bases["roberta"], r=2, target_modules=["query"])
    theirs.save_pretrained(tmp_path / "roberta")
    run = small(f"base={bases['roberta']}", f"data={texts}", *CLASSIFY, f"train.init_from={tmp_path}/roberta")
    with pytest.raises(MethodError, match=r"classifier\.dense\.weight.*single linear layer"):
        train_here(run, tmp_path / "run", start=tmp_path / "roberta")
    peft_model(bases["deberta-v2"], r=2, target_modules=["query_proj"]).save_pretrained(tmp_path / "deberta")
    more = (f"task.labels=[{','.join(ANIMALS)}]", f"train.init_from={tmp_path}/deberta")
    run = small(f"base={bases['deberta-v2']}", f"data={texts}", *CLASSIFY, *more)
    with pytest.raises(BaseModelError, match="no trained pooler"):
        train_here(run, tmp_path / "run", start=tmp_path / "deberta")


def test_a_deberta_that_shares_projections_equals_peft(bases: dict[str, Path]) -> None:
    """Deltas on them act on relative positions, too; the head is ours, since DeBERTa's pooler is another."""
    theirs = peft_model(bases["deberta-v2"], r=3, target_modules=["query_proj", "key_proj"])
    config = theirs.peft_config["default"].to_dict()
    state = peft.get_peft_model_state_dict(theirs)
    tensors = {n.removeprefix("base_model.model."): t for n, t in state.items() if "lora_" in n}
    slot = Slots(bases["deberta-v2"], {})
    knobs = Lora(rank=3, alpha=config["lora_alpha"], targets=("query_proj", "key_proj"))
    head = {"classifier.weight": torch.randn(3, 64), "classifier.bias": torch.zeros(3)}
    task = Classification(labels=ANIMALS, pooling="first")
    slot.bank.add(0, knobs, task=task, tensors=from_files(knobs, task, {**tensors, **head}, slot.bank.scope))
    (batch,) = slot.stepper.deal({0: samples(RECORDS[:4], ANIMALS, encoder=True)})
    with torch.no_grad(), slot.bank.routed(batch.slot_BT, position_BT=batch.position_BT):
        got = slot.classifier.pool(slot.model, batch)
    base = theirs.base_model.model.deberta
    expected = torch.cat([pooled(base, r["text"], "first", encoder=True) for r in RECORDS[:4]])
    torch.testing.assert_close(got, expected[batch.sample_BT[batch.labels_BT >= 0]], rtol=1e-5, atol=1e-5)


def test_a_pass_of_several_slots_over_shared_projections_is_refused(bases: dict[str, Path]) -> None:
    task = Classification(labels=ANIMALS)
    slot = Slots(bases["deberta-v2"], {0: (Lora(rank=2), task), 1: (Lora(rank=2), task)})
    tokens_BT = torch.full((2, 8), 5)
    with slot.bank.routed(torch.tensor([[0] * 8, [1] * 8])), pytest.raises(MethodError, match="one slot, not of 0, 1"):
        slot.model(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT))


def test_the_task_of_a_plain_peft_folder_is_read_off_its_head() -> None:
    assert task_from_peft({"task_type": "CAUSAL_LM"}, {}).type == "causal_lm"
    found = task_from_peft({"task_type": "SEQ_CLS"}, {"score.weight": torch.zeros(3, 8)})
    assert found == Classification(labels=("0", "1", "2"), pooling="last")
    with pytest.raises(MethodError, match="not in the folder"):
        task_from_peft({"task_type": "SEQ_CLS"}, {"model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(3, 8)})


# ---- a run


@pytest.mark.parametrize("arch", ["roberta", "llama"])
def test_a_resumed_run_has_the_same_bits(arch: str, bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    run = small(
        f"base={bases[arch]}",
        f"data={texts}",
        f"data.eval={texts}",
        "task={type: classification, dropout: 0.3}",
        "method.dropout=0.2",
        "train.steps=5",
        "train.eval_every=1",
        "train.metric=accuracy",
    )
    whole = train_here(run, tmp_path / "whole")
    first = train_here(run, tmp_path / "parts", stop_at=2)
    second = train_here(run, tmp_path / "parts")
    for key in ("eval_loss", "accuracy", "f1", "mcc"):
        assert first.of("eval", key) + second.of("eval", key) == whole.of("eval", key)
    assert first.of("step", "loss") + second.of("step", "loss") == whole.of("step", "loss")
    accuracy = whole.of("eval", "accuracy")
    assert whole.of("done", "best_accuracy") == [max(accuracy)]
    assert whole.of("eval", "best_step")[-1] == accuracy.index(max(accuracy)) + 1
    assert whole.latest is not None
    assert second.latest is not None
    for part in ("delta", "best"):
        assert_same_bits(weights(whole.latest / "delta" / part), weights(second.latest / "delta" / part))


def test_a_run_goes_on_with_the_labels_of_its_parent(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    first = train_here(small(f"base={bases['bert']}", f"data={texts}", *CLASSIFY, "train.steps=2"), tmp_path / "first")
    assert first.latest is not None
    parent = first.latest / "delta" / "delta"
    fewer = write(tmp_path / "fewer.jsonl", RECORDS[:6])  # cats and cows
    more = (f"data={fewer}", *CLASSIFY, "train.steps=1", f"train.init_from={parent}")
    second = train_here(small(f"base={bases['bert']}", *more), tmp_path / "second", start=parent)
    assert second.of("data", "task")[0]["labels"] == list(ANIMALS)
    other = small(f"base={bases['bert']}", *more, "task.labels=[dog,cow,cat]")
    with pytest.raises(MethodError, match=r"keeps the delta's labels \(cat, cow, dog\)"):
        train_here(other, tmp_path / "third", start=parent)
    chat = small(f"base={bases['bert']}", f"data={fewer}", f"train.init_from={parent}")
    with pytest.raises(MethodError, match=r"keeps the delta's task, classification"):
        train_here(chat, tmp_path / "fourth", start=parent)


def test_the_files_of_a_delta_come_back(bases: dict[str, Path]) -> None:
    slot = Slots(bases["bert"], {0: (Lora(rank=2), Classification(labels=ANIMALS))})
    tensors, task = slot.bank.tensors(0), slot.bank.task(0)
    assert task is not None
    files, config = to_files(slot.bank.knobs(0), task, tensors, slot.bank.sites(0), slot.bank.scope)
    assert config["modules_to_save"] == ["classifier"]
    assert all(name.startswith(("bert.", "classifier.")) for name in files)
    back = from_files(slot.bank.knobs(0), task, files, slot.bank.scope)
    assert_same_bits(back, tensors)
