"""Rules between knobs: each refusal at its key, and what stands near it but is allowed."""

from pathlib import Path

import pytest

from orchestrator.config.load import load_run, load_serving
from orchestrator.errors import ConfigError

LABELLED = ("task=classification", "data=some/set")


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    """Some cases name files of the project."""
    monkeypatch.chdir(Path(__file__).parents[1])


def wrong(load, overrides: list[str]) -> str:
    """The one line of the error; fails where there is none or more."""
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    _, line = str(caught.value).splitlines()
    return line.strip()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["base.quantize=int8", "cluster.workers=2"], "cluster.workers"),
        (["base.quantize=int8", "shard=3"], "cluster.zero.stage"),
        (["cluster.zero.offload=cpu", "shard=2"], "cluster.zero.offload"),
        (["data.streaming=true"], "data.streaming"),
        (["data.streaming=true", "train.steps=5", "data.eval_fraction=0.1"], "data.eval_fraction"),
        (["data.eval=demo", "data.eval_fraction=0.1"], "data.eval_fraction"),
        (["train.early_stopping=2"], "train.early_stopping"),
        (["train.metric=accuracy", "data.eval=demo"], "train.metric"),
        ([*LABELLED, "train.metric=mcc"], "train.metric"),
        (["task=classification", "data.train=demo"], "data.train.0.path"),
        ([*LABELLED, "data.train={path: some/set, format: prompt}"], "data.train.0.format"),
        ([*LABELLED, "data.streaming=true", "train.steps=5"], "task.labels"),
        ([*LABELLED, "task.labels=[a]"], "task.labels"),
        ([*LABELLED, "task.labels=[a,b,a]"], "task.labels"),
        ([*LABELLED, "task.labels=[a,'']"], "task.labels"),
        (["data.train={path: demo, format: alpaca}", "data.loss_on=flagged"], "data.train.0.format"),
        (["data=missing.jsonl"], "data.train.0.path"),
        (["data=./missing"], "data.train.0.path"),
        (["data='missing/*.jsonl'"], "data.train.0.path"),
        (["data.eval=missing.csv"], "data.eval.0.path"),
        ([f"data={'x' * 300}.jsonl"], "data.train.0.path"),
        (["data=~no-such-user/x.jsonl"], "data.train.0.path"),
        (["data='a**/x.jsonl'"], "data.train.0.path"),
        ([f"base=./{'x' * 300}"], "base.id"),
        (["base=./missing"], "base.id"),
        (["base=pyproject.toml"], "base.id"),
        (["base=tests"], "base.id"),
        (["base.revision=main"], "base.revision"),
        (["name=demo"], "name"),
        (["tracking.register_as=demo"], "tracking.register_as"),
        (["tracking.register_as=../x"], "tracking.register_as"),
        (["tracking.alias=latest"], "tracking.alias"),
        (["tracking.alias=v3"], "tracking.alias"),
        (["train.init_from=./missing"], "train.init_from"),
        (["train.init_from=out/missing"], "train.init_from"),
        (["train.init_from=tests"], "train.init_from"),
        (["train.init_from='a b'"], "train.init_from"),
        (["cluster.storage=pyproject.toml"], "cluster.storage"),
        (["cluster.zero.overrides.stage=3"], "cluster.zero.overrides.stage"),
        *(
            ([f"cluster.zero.overrides.{name}=true"], f"cluster.zero.overrides.{name}")
            for name in (
                "zero_quantized_weights",
                "zero_quantized_nontrainable_weights",
                "zero_quantized_gradients",
                "stage3_use_all_reduce_for_fetch_params",
            )
        ),
    ],
)
def test_refused_together(overrides, key):
    assert wrong(load_run, overrides).startswith(f"{key} (override ")


@pytest.mark.parametrize(
    "overrides",
    [
        ["base.quantize=int8"],
        ["cluster.zero.offload=cpu"],
        ["cluster.zero.offload=cpu", "shard=3"],
        ["data.streaming=true", "train.steps=5"],
        ["train.early_stopping=2", "data.eval_fraction=0.1"],
        ["data.loss_on=flagged"],
        ["data=org/set"],
        ["train.init_from=support@champion"],
        ["train.init_from=support:7"],
        ["base.quantize=none", "cluster.zero.overrides.zero_quantized_weights=true"],
        ["cluster.zero.overrides.zero_quantized_weights=false"],
        ["cluster.zero.overrides.overlap_comm=true"],
    ],
)
def test_allowed_together(overrides):
    load_run(None, overrides)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["deltas=./missing"], "deltas.0"),
        (["deltas=[support, Nope!]"], "deltas.1"),
        (["deltas=[support, support]"], "deltas.1"),
        (["deltas=demo"], "deltas.0"),
        (["deltas=tests"], "deltas.0"),
        (["base=./missing"], "base.id"),
        (["port=70000"], "port"),
        (["prot=8000"], "prot"),
    ],
)
def test_endpoint_refused(overrides, key):
    assert wrong(load_serving, overrides).startswith(f"{key} (override ")


def test_endpoint():
    serving = load_serving(None, ["deltas=[support, 'support:7', support@candidate]", "port=8123"])
    assert serving.deltas == ("support", "support:7", "support@candidate")
    assert serving.port == 8123
