"""Packs: each trial's losses are those of its solo run, whoever is beside it and whatever becomes of them."""

import json
from pathlib import Path

import pytest

from orchestrator.config import Run
from orchestrator.data.demo import demo_records
from tests import tiny
from tests.pack_kit import Played, assert_as_alone, pack_here, trial


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "held.jsonl"
    path.write_text("\n".join(map(json.dumps, demo_records("test", 6))))
    return f"data.eval={path}"


def some(base: Path, held_out: str) -> dict[str, Run]:
    """Unlike each other in all that a trial may choose."""
    return {
        "lora": trial(base, held_out, "train.steps=6", "train.eval_every=2", "method.rank=4"),
        "dora": trial(
            base, held_out, "train.steps=4", "train.eval_every=2", "method.rank=8", "method.dora=true",
            "train.batch_size=2", "data.length=96", "train.schedule=linear", "train.seed=3",
        ),
        "prompt": trial(
            base, held_out, "train.steps=5", "train.eval_every=5", "method=prompt", "method.tokens=5",
            "train.lr=0.1", "train.rows_per_pass=1", "train.batch_size=6",
        ),
        "head": trial(
            base, held_out, "train.steps=3", "train.eval_every=1", "method={type: last_layers, layers: 1, head: true}",
            "train.lr=0.002", "data.packing=false", "train.clip=0.1",
        ),
        "sparse": trial(
            base, held_out, "train.steps=6", "train.eval_every=3",
            "method={type: sparse, density: 0.02, rechoose_every: 2}", "train.weight_decay=0.1", "train.seed=1",
        ),
    }  # fmt: skip


def test_each_trial_trains_as_it_would_alone(base: Path, held_out: str, tmp_path: Path) -> None:
    runs = some(base, held_out)
    at, until = {"dora": 1, "sparse": 3}, {"prompt": 3}
    desk = pack_here(Played(tmp_path / "pack", runs, at, until), trial(base))
    for name, run in runs.items():
        assert_as_alone(
            desk, name, run, tmp_path / "solo", steps=3 if name == "prompt" else None
        ) if name != "prompt" else None
        assert desk.ended(name)["why"] == ("withdrawn" if name == "prompt" else "finished")
    assert desk.ended("prompt")["step"] == 3
