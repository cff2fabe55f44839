"""A search that goes on in another process proposes what it would have proposed without the break."""

from typing import Any

import optuna
import pytest

from orchestrator.config.load import load_search
from orchestrator.search.propose import numbered_sampler, points, propose
from orchestrator.search.space import first_points
from orchestrator.search.study import Row

TRIALS = 14


def worth(point: dict[str, Any]) -> float:
    lr = next(value for key, value in point.items() if key.endswith("train.lr"))
    return float(abs(lr - 2e-3)) + (0.1 if point["method"] == "bitfit" else 0.0)


def proposed(sampler: str, known: list[Row], *, seed: int = 0) -> list[dict[str, Any]]:
    """Points by number, each told its value at once."""
    search = load_search(None, ["methods=[lora, bottleneck, bitfit]", f"sampler={sampler}", f"seed={seed}"])
    study = optuna.create_study(sampler=numbered_sampler(search))
    for point in points(search, known):
        study.enqueue_trial(point)
    out = []
    for number in range(TRIALS):
        trial = study.ask()
        assert propose(search, trial) == {"number": number}
        out.append(dict(trial.params))
        study.tell(trial, worth(trial.params))
    return out


def rows(found: list[dict[str, Any]], numbers: list[int]) -> list[Row]:
    return [Row(f"t{n}", n, params=found[n]) for n in numbers]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
@pytest.mark.parametrize("numbers", [[0], [0, 1], list(range(7)), [0, 1, 2, 4, 6], list(range(TRIALS))])
def test_a_break_changes_no_point(sampler: str, numbers: list[int]) -> None:
    """Also where the earlier driver drew a number that it did not get to offer."""
    whole = proposed(sampler, [])
    assert proposed(sampler, rows(whole, numbers)) == whole


def test_points_differ_by_number_and_by_seed() -> None:
    found = proposed("random", [])
    assert len({str(point) for point in found}) == TRIALS
    assert proposed("random", [], seed=1)[3:] != found[3:]


def test_the_first_points_are_those_of_the_space() -> None:
    search = load_search(None, ["methods=[lora, bottleneck, bitfit]"])
    assert proposed("tpe", [])[:3] == first_points(search)
