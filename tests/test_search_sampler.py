"""What proposes the points of a search: seeds repeat, a grid is its product, Tune takes it all."""

import itertools
import json
import math
import pickle
from collections import Counter
from functools import partial
from typing import Any

import pytest

from orchestrator.config import Search
from orchestrator.config.load import load_search
from orchestrator.config.method import KINDS
from orchestrator.search.space import first_points, sampler, size, suggest, trial_run
from tests.search_kit import WIDE, drawn, search_of


@pytest.mark.parametrize("kind", ["random", "tpe", "grid"])
def test_the_same_seed_draws_the_same(kind):
    def points(seed: int) -> list[dict[str, Any]]:
        search = load_search(None, ["methods=[lora, prompt, ia3]", f"sampler={kind}", f"seed={seed}"])
        return drawn(search, 25, value=lambda p: len(p["method"]) + p["train.batch_size"])

    assert points(1) == points(1)
    assert points(1) != points(2)


def test_a_search_back_from_json_draws_the_same(tmp_path):
    search = search_of(tmp_path, WIDE)
    again = Search.model_validate(json.loads(json.dumps(search.model_dump(mode="json"))))
    assert drawn(again, 15) == drawn(search, 15)
    assert first_points(again) == first_points(search)


def test_a_grid_is_exactly_the_product():
    search = load_search(
        None,
        [
            "methods=[{type: lora, rank: {int: [2, 4]}, dora: {choice: [true, false]}}, {type: prompt, tokens: 5}]",
            "space={train.lr: {choice: [1e-3, 1e-2]}, train.batch_size: {choice: [4, 8]}}",
            "sampler=grid",
        ],
    )
    shared = [{"train.lr": lr, "train.batch_size": b} for lr in (1e-3, 1e-2) for b in (4, 8)]
    wanted = [
        {"method": "lora", "lora.rank": rank, "lora.dora": dora, **rest}
        for rank, dora, rest in itertools.product((2, 3, 4), (True, False), shared)
    ] + [{"method": "prompt", **rest} for rest in shared]
    assert size(search) == len(wanted) == 28
    points = drawn(search, 28)
    assert Counter(str(sorted(p.items())) for p in points) == Counter(str(sorted(p.items())) for p in wanted)


def test_a_grid_of_priors_is_finite():
    search = load_search(None, [f"methods=[{', '.join(set(KINDS) - {'peft'})}]", "sampler=grid", "base.quantize=none"])
    count = size(search)
    assert count is not None
    points = drawn(search, count)
    assert len({str(p) for p in points}) == count
    assert size(load_search(None, ["methods=[lora]"])) is None


def test_the_estimator_goes_where_it_is_better():
    def loss(point: dict[str, Any]) -> float:
        if point["method"] != "lora":
            return 9.0
        return abs(math.log10(point["lora.train.lr"] / 1e-3)) + abs(math.log2(point["lora.rank"] / 8))

    search = load_search(None, ["methods=[lora, prompt, ia3, bitfit]", "seed=3"])
    points = drawn(search, 60, value=loss)
    late = [p for p in points[30:] if p["method"] == "lora"]
    assert len(late) > 20  # a quarter of them by chance
    assert sorted(loss(p) for p in late)[len(late) // 2] < 0.6


def test_tune_searches_the_space(tmp_path):
    from ray.tune.search.optuna import OptunaSearch

    search = search_of(tmp_path, WIDE)
    space = partial(suggest, search)
    assert pickle.loads(pickle.dumps(space))  # Tune keeps it with its state
    tune = OptunaSearch(
        space=space,
        metric="eval_loss",
        mode="min",
        sampler=sampler(search),
        points_to_evaluate=first_points(search),
    )
    seen = []
    for number in range(30):
        params = tune.suggest(str(number))
        assert params is not None
        run = trial_run(search, params, f"search-{number:04}")
        seen.append(params)
        tune.on_trial_result(str(number), {"eval_loss": run.lr, "training_iteration": 1})
        tune.on_trial_complete(str(number), {"eval_loss": run.lr, "training_iteration": 1})
    assert seen[: len(search.methods)] == first_points(search)
    assert len({str(p) for p in seen}) == 30


def test_tune_walks_a_whole_grid():
    from ray.tune.search.optuna import OptunaSearch

    search = load_search(None, ["methods=[lora, ia3]", "sampler=grid", "train.batch_size=8"])
    tune = OptunaSearch(
        space=partial(suggest, search),
        metric="eval_loss",
        mode="min",
        sampler=sampler(search),
        points_to_evaluate=first_points(search),
    )
    seen = set()
    for number in range(size(search) or 0):
        seen.add(str(tune.suggest(str(number))))
        tune.on_trial_complete(str(number), {"eval_loss": 1.0, "training_iteration": 1})
    assert len(seen) == size(search) == 18
