"""Labelled texts to samples: the label set, what a bad label is told, where a long text is cut, what is cached."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import Classification, Data
from orchestrator.config.task import MOST_LABELS
from orchestrator.data import IGNORE, Prepared, deal, pack, prepare
from orchestrator.errors import DataError
from tests import tiny
from tests.classify_kit import write

TASK = Classification()
RECORDS = [{"text": f"the cat {i}", "label": label} for i, label in enumerate(["yes", "no", "maybe", "no"])]


def prepared(path: Path, task: Classification = TASK, *, encoder: bool = True, **kw: Any) -> Prepared:
    longest, seed = kw.pop("longest", None), kw.pop("seed", 0)
    data = Data(**{"train": [str(path)], "length": 32, **kw})
    cache = path.parent / "cache"
    return prepare(data, tiny.tokenizer(encoder=encoder), seed=seed, task=task, longest=longest, cache=cache)


def test_labels_are_those_of_the_records_in_order(tmp_path: Path) -> None:
    done = prepared(write(tmp_path / "a.jsonl", RECORDS))
    assert done.task == Classification(labels=("maybe", "no", "yes"))
    assert sorted(s.label for s in done.train.take(4)) == [0, 1, 1, 2]
    assert (done.report.samples, done.report.trained_tokens) == (4, 4)
    numbers = write(tmp_path / "b.jsonl", [{"text": "a cat", "label": n} for n in (10, 2, -1)])
    assert prepared(numbers).task.labels == ("-1", "2", "10")
    given = Classification(labels=("yes", "no", "maybe", "never"))
    assert sorted(s.label for s in prepared(tmp_path / "a.jsonl", given).train.take(4)) == [0, 1, 1, 2]


@pytest.mark.parametrize("encoder", [True, False])
def test_a_sample_is_the_text_as_the_tokenizer_has_it_and_one_target_at_its_end(tmp_path: Path, encoder: bool) -> None:
    done = prepared(write(tmp_path / "a.jsonl", RECORDS), encoder=encoder)
    read = tiny.tokenizer(encoder=encoder)
    (sample, *_) = taken = done.train.take(4)
    text = next(r["text"] for r in RECORDS if read(r["text"])["input_ids"] == sample.tokens)
    assert (sample.tokens[0] == 1) == (sample.tokens[-1] == 2) == encoder
    assert done.task.labels[sample.label] == next(r["label"] for r in RECORDS if r["text"] == text)
    (batch,) = deal(pack({0: taken}, length=64, packing=True), rank=0, ranks=1, rows_per_pass=4, pad_id=0)
    found = batch.labels_BT != IGNORE
    assert int(found.sum()) == 4
    by_key = {sample.key: sample.label for sample in taken}
    assert batch.labels_BT[found].tolist() == [by_key[key] for key in batch.sample_BT[found].tolist()]
    ends = batch.segment_BT[:, 1:] != batch.segment_BT[:, :-1]
    assert bool(found[:, :-1].equal(ends & (batch.sample_BT[:, :-1] >= 0)))


def test_a_long_text_is_cut_before_the_token_that_ends_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "the cat sat on the mat " * 9, "label": x} for x in "ab"])
    whole = tiny.tokenizer(encoder=True)("the cat sat on the mat " * 9)["input_ids"]
    for longest, expected in ((None, 32), (12, 12), (99, 32)):
        done = prepared(path, longest=longest)
        for sample in done.train.take(2):
            assert sample.tokens == [*whole[: expected - 1], 2]
        assert done.report.truncated == 2
    plain = prepared(path, encoder=False).train.take(1)[0].tokens
    assert plain == tiny.tokenizer()("the cat sat on the mat " * 9)["input_ids"][:32]


def test_a_label_that_is_not_one_is_told_with_its_place_and_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*RECORDS, {"text": "the dog", "label": "mybe"}])
    known = Classification(labels=("yes", "no", "maybe"))
    with pytest.raises(DataError, match=r"a\.jsonl:5: label: 'mybe' is not among the 3 labels; did you mean 'maybe'"):
        prepared(path, known)
    done = prepared(path, known, on_bad_record="skip")
    assert (done.report.samples, done.report.skipped) == (4, 1)
    held = write(tmp_path / "held.jsonl", [{"text": "the dog", "label": "perhaps"}])
    with pytest.raises(DataError, match=r"held\.jsonl:1: label: 'perhaps' is not among the 3 labels: maybe, no, yes"):
        prepared(write(tmp_path / "b.jsonl", RECORDS), eval=[str(held)])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], r"have no label"),
        ([{"text": "a", "label": "x"}], r"only the label 'x'"),
        ([{"text": str(n), "label": n} for n in range(MOST_LABELS + 1)], r"more than 10,000 labels"),
        ([*RECORDS, {"prompt": "a", "completion": "b"}], r"a\.jsonl:5: has no field 'text' \(layout label\)"),
        ([*RECORDS, {"text": "a", "label": None}], r"a\.jsonl:5: label: must be text or a whole number, is null"),
    ],
)
def test_records_without_classes_are_refused(records: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        prepared(write(tmp_path / "a.jsonl", records))


def test_columns_name_text_and_label(tmp_path: Path) -> None:
    rows = [{"sentence": r["text"], "class": r["label"], "text": "not this"} for r in RECORDS]
    source = {"path": str(write(tmp_path / "a.jsonl", rows)), "columns": {"text": "sentence", "label": "class"}}
    done = prepared(tmp_path / "a.jsonl", train=[source])
    assert done.task.labels == ("maybe", "no", "yes")
    read = tiny.tokenizer(encoder=True)
    assert sorted(s.tokens for s in done.train.take(4)) == sorted(read(r["text"])["input_ids"] for r in RECORDS)


def test_the_cache_tells_label_sets_and_tasks_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    first = prepared(path)
    assert not first.report.cached
    again = prepared(path)
    assert again.report.cached
    assert again.digest == first.digest
    other = prepared(path, Classification(labels=("yes", "no", "maybe")))
    assert not other.report.cached
    assert other.digest != first.digest
    data = Data(train=[str(path)], length=32)
    text = prepare(data, tiny.tokenizer(), seed=0, cache=tmp_path / "cache")
    assert not text.report.cached
    assert text.train.take(1)[0].label is None
    more = write(path, [*RECORDS, {"text": "the hen", "label": "never"}])
    assert prepared(more).task.labels == ("maybe", "never", "no", "yes")


def test_a_streamed_set_needs_its_labels_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(DataError, match=r"task\.labels"):
        prepared(path, streaming=True)
    done = prepared(path, Classification(labels=("maybe", "no", "yes")), streaming=True)
    assert sorted(s.label for s in done.train.take(4)) == [0, 1, 1, 2]


def test_what_a_cut_of_the_held_out_set_counts(tmp_path: Path) -> None:
    rows = [{"text": f"the cat {i}", "label": "ab"[i % 2]} for i in range(10)]
    done = prepared(write(tmp_path / "a.jsonl", rows), eval_fraction=0.3)
    assert done.eval is not None
    assert done.report.eval is not None
    assert (done.report.trained_tokens, done.report.eval.trained_tokens) == (7, 3)
    assert all(s.label is not None for s in done.eval)
    assert json.dumps(done.report.as_dict())
