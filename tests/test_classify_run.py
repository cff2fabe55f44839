"""Classifiers come and go with peft, resume with the same bits, and keep their labels from run to registry."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from orchestrator.config import Classification, Lora
from orchestrator.errors import BaseModelError, MethodError
from orchestrator.launch.train import train
from orchestrator.methods import from_files, task_from_peft, to_files
from orchestrator.train.classify import predict
from tests import tiny
from tests.classify_kit import (
    ANIMALS,
    CLASSIFY,
    HEAD,
    RECORDS,
    Slots,
    pooled,
    samples,
    save_bases,
    write,
)
from tests.launch_kit import assert_same_bits, local_ray, small, train_here, weights


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "texts.jsonl")


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


@pytest.mark.slow
def test_a_run_on_ray_keeps_labels_and_metrics(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    run = small(
        "name=animals",
        f"base={bases['bert']}",
        f"data={texts}",
        f"data.eval={texts}",
        *CLASSIFY,
        "train.steps=6",
        "train.eval_every=2",
        "train.metric=f1",
        f"cluster.storage={tmp_path}/storage",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    )
    with local_ray():
        outcome = train(run)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    version = client.get_model_version_by_alias("animals", "candidate")
    tracked = client.get_run(version.run_id)
    assert json.loads(tracked.data.params["task.labels"]) == list(ANIMALS)
    assert tracked.data.params["task.type"] == "classification"
    f1 = [m.value for m in client.get_metric_history(version.run_id, "f1") if m.step]
    assert len(f1) == 3
    assert outcome.metrics["best_f1"] == max(f1)
    manifest = json.loads((outcome.delta / "manta.json").read_text())
    assert manifest["run"]["task"]["labels"] == manifest["task"]["labels"] == list(ANIMALS)
    assert manifest["metrics"]["f1"] == max(f1), "the best one is kept"
    card = (outcome.delta / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "num_labels=3" in card


def test_the_files_of_a_delta_come_back(bases: dict[str, Path]) -> None:
    slot = Slots(bases["bert"], {0: (Lora(rank=2), Classification(labels=ANIMALS))})
    tensors, task = slot.bank.tensors(0), slot.bank.task(0)
    assert task is not None
    files, config = to_files(slot.bank.knobs(0), task, tensors, slot.bank.sites(0), slot.bank.scope)
    assert config["modules_to_save"] == ["classifier"]
    assert all(name.startswith(("bert.", "classifier.")) for name in files)
    back = from_files(slot.bank.knobs(0), task, files, slot.bank.scope)
    assert_same_bits(back, tensors)
