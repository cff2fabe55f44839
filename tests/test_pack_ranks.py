"""A pack on two ranks, the base whole on each or sharded, against each trial alone on one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.launch_kit import small, train_here
from tests.pack_kit import Played, assert_same
from tests.ranks import run_ranks

TRIALS: dict[str, list[str]] = {
    "lora": ["train.steps=5", "train.eval_every=2", "method.dropout=0.1"],
    "bitfit": ["method=bitfit", "train.steps=4", "train.batch_size=3", "data.length=96", "train.eval_every=4"],
    "pissa": ["method.start=pissa", "method.rank=4", "train.steps=3", "train.lr=0.001", "train.eval_every=3"],
    "fisher": [
        "method={type: sparse, density: 0.02, choose: fisher, fisher_samples: 5}",
        *("train.steps=4", "train.eval_every=2", "train.seed=2", "data.packing=false"),
    ],
    "target": ["method.targets=[none_such]", "train.steps=4"],
    "stopped": ["method={type: prompt, tokens: 4}", "train.lr=0.1", "train.steps=6", "train.eval_every=2"],
}


def heard(report: dict[str, Any], folder: Path) -> Played:
    """What the first rank's desk heard, to be asked."""
    desk = Played(folder, {})
    desk.heard = [tuple(each) for each in report["heard"]]  # type: ignore[misc]
    return desk


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "quantize"), [(3, "none"), (3, "nf4"), (0, "none")])
def test_each_trial_trains_as_it_would_alone_on_one_rank(stage: int, quantize: str, tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", num_hidden_layers=3)
    shared = [f"base={base}", f"base.quantize={quantize}", "data.eval_fraction=0.004", f"shard={stage}"]
    at, until = {"bitfit": 1, "target": 2, "fisher": 2}, {"stopped": 3}
    reports = run_ranks(
        "tests.pack_work_script", 2, tmp_path / "ranks", shared=shared, trials=TRIALS, at=at, until=until
    )
    desk = heard(reports[0], tmp_path / "told")
    assert reports[1]["heard"] == [], "the first rank speaks"
    for name, own in TRIALS.items():
        if name == "target":
            assert "none_such" in desk.ended(name)["reason"]
            continue
        told = train_here(small(*shared, *own, "shard=0"), tmp_path / "solo" / name)
        assert_same(desk, name, told, steps=3 if name == "stopped" else None)
        assert desk.ended(name)["why"] == ("withdrawn" if name == "stopped" else "finished")


@pytest.mark.slow
def test_one_rank_out_of_memory_ends_the_group_which_knows_what_would_fit(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    shared = [f"base={base}", "base.quantize=none", "shard=0"]
    trials = {"a": ["train.steps=6"], "b": ["train.steps=6", "method.rank=4"]}
    with pytest.raises(AssertionError):  # the first rank loses its peer
        run_ranks(
            "tests.pack_work_script", 2, tmp_path / "ranks", shared=shared, trials=trials, at={}, until={}, full=6
        )
    report = json.loads((tmp_path / "ranks" / "1.json").read_text())
    assert "out of memory with 2 trials" in report["failed"]
    assert report["shrunk"] == [[2, 256]]
