"""What Ray Tune is told to compare, with no cluster behind it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.config.search import Search
from orchestrator.launch import tuner
from orchestrator.launch.pack_reporter import RayPackReporter
from orchestrator.search.study import Study, append, read_lines

CLASSES = {"task": {"type": "classification", "labels": ["a", "b"]}, "data": {"eval_fraction": 0.1}}


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_trials_are_stopped_by_what_they_learn_whatever_comes_first(scheduler: str) -> None:
    search = Search.model_validate({"objective": ["parameters", "accuracy"], "scheduler": scheduler, **CLASSES})
    made = tuner._scheduler(search)
    assert made._metric == "accuracy"


def test_an_evaluation_without_the_objective_ends_no_search() -> None:
    """Where losses are told every tenth step, an evaluation in between has none."""
    searcher: Any = tuner._Searcher(space=lambda _: {}, metric="loss", mode="min")
    searcher.on_trial_result("of another", {"training_iteration": 1})
    with pytest.raises(KeyError):
        searcher.on_trial_result("of another", {"loss": 1.0, "training_iteration": 1})


@pytest.mark.parametrize(
    ("objective", "metric", "best"), [(["parameters", "accuracy"], {}, 2), (["accuracy"], {"metric": "eval_loss"}, 1)]
)
def test_the_row_tells_of_the_delta_that_is_kept(objective: list[str], metric: dict[str, str], best: int) -> None:
    study = Study(Search.model_validate({"objective": objective, "train": metric, **CLASSES}))
    study.hear("t", "eval", {"step": 1, "eval_loss": 0.5, "accuracy": 0.7}, 1.0)
    study.hear("t", "eval", {"step": 2, "eval_loss": 0.6, "accuracy": 0.9}, 2.0)
    assert study.rows["t"].best_step == best


def test_a_disk_that_takes_a_part_is_asked_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def slow(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = real(self, *args, **kwargs)
        if self.name != "study.jsonl" or args[:1] != ("a+b",):
            return file
        return _Slow(file)

    monkeypatch.setattr(Path, "open", slow)
    append(tmp_path, [("t", "saved", {"step": n}) for n in range(9)])
    assert [line["values"]["step"] for line in read_lines(tmp_path)] == list(range(9))


class _Slow:
    """Takes seven bytes at a time, as a raw file may."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> "_Slow":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        return int(self._file.write(data[:7]))


def test_what_was_said_is_heard_before_a_checkpoint_makes_it_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack that is killed right after it goes on behind its last evaluation, which nobody would tell again."""
    order: list[str] = []
    desk: Any = SimpleNamespace(tell=SimpleNamespace(remote=lambda _, said: order.append(json.dumps(said))))
    store: Any = SimpleNamespace(save=lambda *_: order.append("saved"))
    monkeypatch.setattr("orchestrator.launch.pack_reporter.ray.get", lambda _: None)
    reporter = RayPackReporter(desk, "p", store)
    reporter.tell("t", "eval", {"step": 3})
    reporter.checkpoint("t", 3, lambda _: None)
    assert order == ['[["t", "eval", {"step": 3}]]', "saved"]
