import json
import random
import re

import pytest

from orchestrator.data.demo import demo_records
from orchestrator.data.demo_text import document, render_chat
from orchestrator.errors import DataError


def test_demo_records_are_reproducible_and_all_different() -> None:
    records = demo_records("train", 500, seed=3)
    assert records == demo_records("train", 500, seed=3)
    assert records != demo_records("train", 500, seed=4)
    assert demo_records("train", 20, seed=3) == records[:20]
    assert len({r["prompt"] for r in records}) == 500


def test_answers_say_what_the_sentence_says() -> None:
    for record in demo_records("test", 300):
        answer = json.loads(record["completion"])
        assert list(answer) == ["for", "cargo", "drop"]
        last, first = answer["for"].split(", ")
        assert f"{first} {last}" in record["prompt"]
        city, day = answer["drop"]
        assert city in record["prompt"]
        assert re.search(rf"\b{day.capitalize()}\w*day\b", record["prompt"])
        trait, item = answer["cargo"]["what"].split()
        assert re.search(rf"{trait} {item[:-1]}", record["prompt"], re.IGNORECASE)


def test_no_person_with_goods_is_in_both_splits() -> None:
    def pairs(split: str) -> set[tuple[str, str]]:
        answers = [json.loads(r["completion"]) for r in demo_records(split, 3000)]
        return {(a["for"], a["cargo"]["what"]) for a in answers}

    assert not pairs("train") & pairs("test")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="'train' and 'test', not 'dev'"):
        demo_records("dev", 1)


def test_pretraining_text_is_reproducible_and_never_holds_the_schema_of_the_task() -> None:
    texts = [document(random.Random(i)) for i in range(3000)]
    assert texts == [document(random.Random(i)) for i in range(3000)]
    assert not any('"cargo"' in t or '"drop"' in t for t in texts)
    assert sum("<|im_start|>" in t for t in texts) > 1500
    assert all(t.count("<|im_start|>") == t.count("<|im_end|>") for t in texts)


def test_render_chat_is_chatml() -> None:
    assert render_chat([("user", "a"), ("assistant", "b")]) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
