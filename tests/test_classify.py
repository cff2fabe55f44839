"""Classification: transformers says the same; slots keep their labels and their passes apart."""

from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator.config import Bottleneck, Classification, Lora, Prefix, Prompt
from orchestrator.errors import BaseModelError
from orchestrator.train.classify import predict
from orchestrator.train.metrics import classification_metrics
from tests import tiny
from tests.classify_kit import (
    ANIMALS,
    CLASSIFY,
    DECODERS,
    HEAD,
    RECORDS,
    Slots,
    pooled,
    samples,
    save_bases,
    transformer,
    write,
)
from tests.launch_kit import small, train_here, weights


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_bases(tmp_path_factory.mktemp("bases"))


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


@pytest.mark.parametrize("arch", ["roberta", "llama"])
def test_methods_that_put_tokens_before_a_text_leave_its_pooling_alone(arch: str, bases: dict[str, Path]) -> None:
    """Packed with others, a slot pools the text's own tokens, as it does alone, one text a row."""
    encoder = arch in tiny.ENCODERS
    slots = {
        0: (Prompt(tokens=3), Classification(labels=ANIMALS, pooling="first")),
        1: (Prompt(tokens=5), Classification(labels=ANIMALS, pooling="mean")),
        2: (Prefix(tokens=4), Classification(labels=ANIMALS, pooling="mean")),
        3: (Bottleneck(size=4), Classification(labels=ANIMALS, pooling="last")),
    }
    mine = samples(RECORDS[:6], ANIMALS, encoder=encoder)
    together = Slots(bases[arch], slots)
    losses, _ = together.step(dict.fromkeys(slots, mine))
    for slot, own in slots.items():
        alone = Slots(bases[arch], {slot: own})
        one_by_one = [alone.step({slot: [sample]})[0][slot] for sample in mine]
        assert losses[slot] == pytest.approx(sum(one_by_one) / len(mine), rel=1e-5)


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
