"""The space of a search: every point is a good run, methods do not mix, the defaults come first."""

import json
import re
from pathlib import Path

import pytest

from orchestrator.config import Run
from orchestrator.config.load import load_run, load_search
from orchestrator.config.method import KINDS
from orchestrator.errors import ConfigError
from orchestrator.methods.last_layers import LastLayers
from orchestrator.search.points import dimensions
from orchestrator.search.priors import LEARNING_RATES, PRIORS, knob_priors
from orchestrator.search.space import first_points, labels, modes, trial_run
from orchestrator.train.lane import lane_of
from tests.search_kit import WIDE, drawn, search_of

ROOT = Path(__file__).parents[1]


# ---- every point is a run


@pytest.mark.parametrize(("kind", "count"), [("random", 200), ("tpe", 80)])
def test_every_point_is_a_good_run(tmp_path, kind, count):
    search = search_of(tmp_path, WIDE, f"sampler={kind}")
    points = drawn(search, count)
    assert set(labels(search)) == {p["method"] for p in points}
    for number, point in enumerate(points):
        run = trial_run(search, json.loads(json.dumps(point)), f"search-{number:04}")
        assert isinstance(run, Run)
        assert run.name == f"search-{number:04}"
        assert (run.base, run.cluster, run.tracking, run.task) == (
            search.base,
            search.cluster,
            search.tracking,
            search.task,
        )
        entry = search.methods[labels(search).index(point["method"])]
        assert run.method.type == entry["type"] == point["method"].partition("#")[0]
        assert run.data.length == point["data.length"]
        assert run.train.warmup == point["train.warmup"]
        assert run.lr > 0


def test_no_point_holds_another_methods_knobs(tmp_path):
    search = search_of(tmp_path, WIDE)
    shared = {"method", "data.length", "train.warmup", "train.schedule", "train.batch_size"}
    for point in drawn(search, 60):
        own = set(point) - shared
        assert all(name.startswith(f"{point['method']}.") for name in own)
        knobs = {name.removeprefix(f"{point['method']}.") for name in own} - {"train.lr"}
        kind = KINDS[point["method"].partition("#")[0]]
        assert {knob.partition(".")[0] for knob in knobs} <= set(kind.model_fields)


def test_what_is_drawn_is_what_the_run_has(tmp_path):
    search = search_of(tmp_path, WIDE)
    shared = {"data.length": 256, "train.warmup": 0.1, "train.schedule": "constant", "train.batch_size": 4}
    point = {"method": "lora#2", "lora#2.rank": 5, "lora#2.targets": '["q_proj", "v_proj"]', "lora#2.rslora": True}
    run = trial_run(search, {**point, "lora#2.train.lr": 1e-3, **shared}, "a")
    assert (run.method.rank, run.method.targets, run.method.rslora) == (5, ("q_proj", "v_proj"), True)
    assert (run.train.lr, run.train.batch_size, run.train.schedule) == (1e-3, 4, "constant")
    run = trial_run(search, {"method": "lora#3", "lora#3.ranks.q_proj": 2, "lora#3.train.lr": 2e-5, **shared}, "a")
    assert (run.method.rank, run.method.alpha, run.method.ranks) == (8, 4, {"q_proj": 2})
    run = trial_run(search, {"method": "last_layers", "last_layers.layers": 4, **shared}, "a")
    assert (run.method.layers, run.train.lr) == (4, 1e-5)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (16, 32), (64, 128)])
def test_the_scale_of_lora_is_the_same_at_every_rank(rank, alpha):
    search = load_search(None, [f"methods={{type: lora, rank: {rank}}}", "train={lr: 1e-3, batch_size: 8}"])
    assert trial_run(search, {"method": "lora"}, "a").method.alpha == alpha


def test_the_weight_of_a_source_can_be_searched():
    search = load_search(
        None, ["data={train: [demo, demo], eval: demo}", "space.data.train.1.weight={choice: [1, 3]}", "train.lr=1e-3"]
    )
    point = {**first_points(search)[0], "data.train.1.weight": 3}
    assert [source.weight for source in trial_run(search, point, "a").data.train] == [1, 3]


def test_two_knobs_that_exclude_each_other_end_that_trial_alone(tmp_path):
    search = search_of(
        tmp_path,
        "methods: [{type: lora, rank: 4, dora: {choice: [true, false]}, start: {choice: [zero, pissa]}}]\n"
        "train: {lr: 1e-3, batch_size: 8}\n",
    )
    point = {"method": "lora", "lora.dora": True, "lora.start": "pissa"}
    with pytest.raises(ConfigError, match=r"search-0003.*\n.*method.*dora and start: pissa exclude each other"):
        trial_run(search, point, "search-0003")
    assert trial_run(search, {**point, "lora.dora": False}, "search-0004").method.start == "pissa"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "ia3#9"}, "none of lora"),
        ({"bitfit.rank": 3}, "unknown or missing: bitfit.rank"),
        ({"lora.rank": 5}, "lora.rank: 5 is none of 4, 8, 16"),
    ],
)
def test_a_point_of_another_space_is_refused(tmp_path, change, said):
    search = search_of(tmp_path, WIDE)
    with pytest.raises(ConfigError, match=re.escape(said)):
        trial_run(search, {**first_points(search)[0], **change}, "a")


# ---- what is searched where nothing is said


def test_methods_alone_are_a_good_search():
    search = load_search(None, ["methods=[lora, bottleneck, prompt]"])
    names = [[d.name for d in dimensions(search, i)] for i in range(3)]
    assert names == [
        ["lora.rank", "lora.train.lr", "train.batch_size"],
        ["bottleneck.size", "bottleneck.placement", "bottleneck.train.lr", "train.batch_size"],
        ["prompt.tokens", "prompt.train.lr", "train.batch_size"],
    ]


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        (["train.lr=1e-3"], {"lora.train.lr"}),
        (["train.batch_size=16"], {"train.batch_size"}),  # the default, but said
        (["train.steps=10"], {"train.batch_size"}),  # a smaller batch would see less data
        (["methods=[{type: lora, rank: 8}]"], {"lora.rank"}),
        (["methods=[{type: lora, train.lr: 1e-3}]"], {"lora.train.lr"}),
    ],
)
def test_what_is_given_is_not_searched(settings, gone):
    def names(*overrides: str) -> set[str]:
        return {d.name for d in dimensions(load_search(None, overrides), 0)}

    assert names() - names(*settings) == gone
    assert names(*settings) < names()


def test_a_range_of_the_file_goes_before_the_prior():
    search = load_search(
        None, ["methods=[{type: lora, rank: {choice: [3]}}, ia3]", "space.train.lr={log: [1e-6, 1e-5]}"]
    )
    for point in drawn(search, 20):
        assert point.get("lora.rank", 3) == 3
        assert 1e-6 <= point["train.lr"] <= 1e-5
        assert not any(name.endswith(".train.lr") for name in point)


def test_priors_are_of_knobs_that_there_are():
    assert set(LEARNING_RATES) == set(KINDS)
    for method, knobs in PRIORS.items():
        for knob, span in knob_priors(method, 1024, finite=False).items():
            for _, value in span.probes():
                KINDS[method].model_validate({"type": method, knob: value})
        assert knobs


def test_learning_rates_reach_from_the_defaults_to_the_best_of_the_bench():
    said = (ROOT / "jobs/bench/methods.md").read_text().partition("Learning rates chosen")[2]
    best = re.findall(r"(\w+)(?:[+% ][\w% ]*)? (\d\.\d+)/(\d\.\d+)", said.partition("): ")[2])
    assert {name for name, *_ in best} >= {"full", "lora", "bottleneck", "prompt", "prefix", "ia3", "bitfit", "sparse"}
    for name, *rates in best:
        low, high = LEARNING_RATES.get(name, LEARNING_RATES["lora"])
        assert all(low <= float(rate) <= high for rate in rates), name
    for name, (low, high) in LEARNING_RATES.items():
        assert low <= KINDS[name].default_lr <= high


def test_virtual_tokens_leave_room_for_the_text():
    tokens = [knob_priors("prompt", length, finite=False)["tokens"].values for length in (16, 100, 1024)]
    assert tokens == [(10,), (10, 20), (10, 20, 50)]


# ---- the first points


def test_the_defaults_of_every_method_come_first():
    search = load_search(None, ["methods=[lora, bottleneck, prompt, prefix, ia3, sparse, last_layers]"])
    for point, entry in zip(first_points(search), search.methods, strict=True):
        run = trial_run(search, point, "first")
        plain = load_run(None, [f"method={entry['type']}"])
        assert run.method == plain.method
        assert run.lr == plain.lr
        assert run.train.batch_size == plain.train.batch_size


def test_a_first_point_stays_within_the_ranges():
    search = load_search(
        None,
        ["methods=[{type: lora, rank: {int: [20, 30]}, start: {choice: [pissa]}}]", "space.train.lr={log: [1, 2]}"],
    )
    assert first_points(search) == [
        {"method": "lora", "lora.rank": 20, "lora.start": "pissa", "train.lr": 1, "train.batch_size": 16}
    ]


def test_a_trial_is_kept_by_what_the_search_is_judged_by(tmp_path):
    (tmp_path / "my.jsonl").touch()
    settings = ["task=classification", f"data={{train: {tmp_path}/my.jsonl, eval_fraction: 0.1}}"]
    search = load_search(None, [*settings, "objective=[parameters, mcc]"])
    assert trial_run(search, first_points(search)[0], "a").train.metric == "mcc"
    search = load_search(None, [*settings, "objective=[parameters, mcc]", "train.metric=f1"])
    assert trial_run(search, first_points(search)[0], "a").train.metric == "f1"


# ---- objectives and lanes


def test_modes(tmp_path):
    (tmp_path / "my.jsonl").touch()
    settings = ["task=classification", f"data={{train: {tmp_path}/my.jsonl, eval_fraction: 0.1}}"]
    search = load_search(None, [*settings, "objective=[accuracy, parameters, latency]"])
    assert list(modes(search).items()) == [("accuracy", "max"), ("parameters", "min"), ("latency", "min")]


@pytest.mark.parametrize(
    ("method", "quantize", "expected"),
    [
        ("lora", "nf4", "shared"),
        ("prefix", "nf4", "shared"),
        ("{type: last_layers, layers: 2}", "none", "shared"),
        ("{type: last_layers, layers: 2}", "nf4", "last_layers2"),
        ("{type: last_layers, layers: 3}", "int8", "last_layers3"),
        ("full", "none", "alone"),
        ("{peft: {type: VERA}}", "none", "alone"),
    ],
)
def test_lanes(method, quantize, expected):
    run = load_run(None, [f"method={method}", f"base.quantize={quantize}"])
    lane = lane_of(run).partition("-")[0]
    assert lane == expected
    # The layers that the method itself asks to be held unquantized, of a base of 24.
    if run.method.type == "last_layers" and quantize != "none":
        assert lane.endswith(str(len(LastLayers().unquantized(run.method, 24))))


@pytest.mark.parametrize("name", ["search.yaml", "search-classify.yaml"])
def test_shipped_searches_hold_good_trials(name, tmp_path):
    for part in ("train", "eval"):
        (tmp_path / f"{part}.jsonl").touch()
    own = [f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/eval.jsonl"] if "classify" in name else []
    search = load_search(ROOT / "jobs/runs" / name, own)
    for number, point in enumerate([*first_points(search), *drawn(search, 24)]):
        trial_run(search, point, f"{search.name}-{number:04}")
    assert search.budget.trials is not None
    assert len({entry["type"] for entry in search.methods}) >= 4
