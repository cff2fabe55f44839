"""A classifier on an NF4 base that ZeRO-3 shards over two ranks is the one of a whole process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.classify_kit import CLASSIFY, write
from tests.ranks import run_ranks

REST = [name for name in (*tiny.ENCODERS, "llama", "qwen3") if name != "bert"]


def both(folder: Path, names: list[str], *more: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What two sharded ranks report, and one whole process."""
    data = write(folder / "texts.jsonl")
    bases = {name: str(tiny.save(folder / name, name)) for name in names}
    settings = [*CLASSIFY, f"data.eval={data}", "train.eval_every=1", *more]
    given = {"bases": bases, "data": str(data), "more": settings}
    sharded = run_ranks("tests.architecture_script", 2, folder / "sharded", stage=3, **given)
    return sharded, run_ranks("tests.architecture_script", 1, folder / "whole", stage=0, **given)[0]


def assert_same(sharded: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for name, expected in whole.items():
        assert "error" not in expected, expected
        for report in sharded:
            for key in ("losses", "norms"):
                got, want = torch.tensor(report[name][key]), torch.tensor(expected[key])
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert report[name]["bytes_here"] < 0.75 * report[name]["bytes_total"]
            assert len(report[name]["evals"]) == len(expected["evals"]) == 2
            for mine, theirs in zip(report[name]["evals"], expected["evals"], strict=True):
                assert {"eval_loss", "accuracy", "f1", "mcc"} <= mine.keys()
                assert all(math.isclose(mine[k], theirs[k], rel_tol=1e-5, abs_tol=1e-6) for k in mine)
        assert expected["losses"][0] != expected["losses"][1]


def test_two_sharded_ranks_train_a_classifier_as_one_whole_process(tmp_path: Path) -> None:
    # With five texts a step, in one row, one of the ranks has a row of padding alone.
    assert_same(*both(tmp_path, ["bert"], "task.pooling=pooler", "train.batch_size=5"))


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_so_they_do_on_each_architecture(name: str, tmp_path: Path) -> None:
    assert_same(*both(tmp_path, [name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deberta-v2", "llama"])
def test_so_they_do_where_activations_are_recomputed(name: str, tmp_path: Path) -> None:
    assert_same(*both(tmp_path, [name], "train.recompute=true", "train.batch_size=5"))
