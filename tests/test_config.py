"""Reading runs and endpoints: what is accepted, and that every mistake is said, at its place, with what is right."""

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from orchestrator.config import Run, Search, Serving
from orchestrator.config.explain import nearest
from orchestrator.config.load import apply_overrides, load_run, load_serving
from orchestrator.config.schema import json_schema
from orchestrator.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error; fails where there is none."""
    with pytest.raises(ConfigError) as caught:
        load_run(write(tmp_path, text), overrides)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{len(lines)} mistake")
    return [line.strip().replace(str(tmp_path) + "/", "") for line in lines]


def one(tmp_path: Path, text: str, *overrides: str) -> str:
    (line,) = mistakes(tmp_path, text, *overrides)
    return line


# ---- what is accepted


def test_nothing_at_all_is_a_run():
    assert load_run() == Run()
    assert load_serving() == Serving()


def test_empty_file_is_a_run(tmp_path):
    assert load_run(write(tmp_path, "# nothing yet\n")) == Run()


def test_short_forms_without_a_file(tmp_path):
    mine = tmp_path / "my.jsonl"
    mine.touch()
    run = load_run(None, ["base=Qwen/Qwen3-0.6B", f"data={mine}", "cluster.workers=2", "method.targets=q_proj"])
    assert (run.base.id, run.data.train[0].path) == ("Qwen/Qwen3-0.6B", str(mine))
    assert (run.cluster.workers.min, run.cluster.workers.max) == (2, 2)
    assert run.method.targets == ("q_proj",)


def test_file_and_overrides(tmp_path):
    path = write(tmp_path, "name: support\nmethod: {rank: 8}\ntrain:\n  lr: 3e-4\n  steps: 10\n")
    run = load_run(
        path, ["method.rank=32", "train.lr=1e-3", "tracking.alias=null", "method.targets=[q_proj, .*v_proj]"]
    )
    assert (run.name, run.method.rank, run.train.lr, run.train.steps) == ("support", 32, 1e-3, 10)
    assert run.tracking.alias is None
    assert run.method.targets == ("q_proj", ".*v_proj")


def test_last_override_wins():
    assert load_run(None, ["method.rank=1", "method.rank=2"]).method.rank == 2


def test_short_override_keeps_the_rest_and_a_mapping_replaces(tmp_path):
    text = "base: {id: org/one, quantize: none}\ndata: {train: demo, length: 64}\n"
    run = load_run(write(tmp_path, text), ["base=org/two", "data=org/set"])
    assert (run.base.id, run.base.quantize) == ("org/two", "none")
    assert (run.data.train[0].path, run.data.length) == ("org/set", 64)
    assert load_run(write(tmp_path, text), ["base={id: org/two}"]).base.quantize == "nf4"


@pytest.mark.parametrize("text", ["data: demo", "data: {train: demo}", "data: {train: [demo]}", ""])
def test_override_reaches_into_short_forms_and_defaults(tmp_path, text):
    run = load_run(write(tmp_path, text), ["data.train.0.weight=2", "data.train.1=org/set"])
    assert [(s.path, s.weight) for s in run.data.train] == [("demo", 2.0), ("org/set", 1.0)]


def test_override_of_one_end_of_a_range():
    workers = load_run(None, ["cluster.workers.max=4"]).cluster.workers
    assert (workers.min, workers.max) == (1, 4)


def test_shard_is_short_for_the_stage(tmp_path):
    path = write(tmp_path, "shard: 2")
    assert load_run(path).cluster.zero.stage == 2
    assert load_run(path, ["cluster.zero.stage=3"]).cluster.zero.stage == 3
    assert load_run(path, ["shard=1"]).cluster.zero.stage == 1


def test_yaml_of_today(tmp_path):
    text = "tracking: {tags: {answer: no, day: 2026-01-31}}\ncluster: {zero: {overrides: {big: 5e8}}}\n"
    run = load_run(write(tmp_path, text))
    assert run.tracking.tags == {"answer": "no", "day": "2026-01-31"}
    assert run.cluster.zero.overrides == {"big": 5e8}


def test_anchors_and_merges(tmp_path):
    text = "data:\n  train:\n  - &a {path: org/a, split: test}\n  - {<<: *a, path: org/b}\n"
    assert [(s.path, s.split) for s in load_run(write(tmp_path, text)).data.train] == [
        ("org/a", "test"),
        ("org/b", "test"),
    ]


def test_dollars_and_braces_are_text(tmp_path):
    assert load_run(write(tmp_path, "tracking: {owner: '${HOME}'}")).tracking.owner == "${HOME}"


def test_apply_overrides_leaves_its_input_alone():
    values = {"method": {"rank": 4}}
    assert apply_overrides(values, ["method.rank=8"]) == {"method": {"rank": 8}}
    assert values == {"method": {"rank": 4}}


# ---- mistakes


def test_all_mistakes_at_once(tmp_path):
    text = """\
name: Bad_Name
base: {quantize: nf5}
data: {train: data/missing.jsonl}
method: {rnak: 8}
train:
  batch_size: 0
  early_stopping: 3
shard: 7
"""
    lines = mistakes(tmp_path, text, "train.stepz=5", "cluster.workers=0", "nonsense")
    expected = [
        ("name (run.yaml:1)", "Bad_Name", "matching"),
        ("base.quantize (run.yaml:2)", '"nf5"', "none, int8, nf4", "nearest: nf4"),
        ("data.train.0.path (run.yaml:3)", "data/missing.jsonl does not exist"),
        ("method.rnak (run.yaml:4)", "unknown key", "method.rank", "alpha"),
        ("train.batch_size (run.yaml:6)", "got 0", "whole number at least 1", "nearest: 1"),
        ("train.early_stopping (run.yaml:7)", "data.eval"),
        ("cluster.zero.stage (run.yaml:8)", "got 7", "auto, 0, 1, 2, 3"),
        ("train.stepz (override 'train.stepz=5')", "train.steps"),
        ("cluster.workers.min (override 'cluster.workers=0')", "at least 1"),
        ("cluster.workers.max (override 'cluster.workers=0')", "at least 1"),
        ("override 'nonsense'", "key=value"),
    ]
    for parts in expected:
        assert any(all(part in line for part in parts) for line in lines), (parts, lines)
    assert len(lines) == len(expected)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rank: 3", ("rank (run.yaml:1): unknown key", "method.rank")),
        ("train:\n  lr: 1\n  lr: 2", ("train.lr (run.yaml:3): given twice; first on line 2",)),
        ("train: 5", ("train (run.yaml:1): got 5", "mapping with steps")),
        ("train: {lr: fast}", ('train.lr (run.yaml:1): got "fast"', "number above 0")),
        ("train: {lr: .inf}", ("train.lr", "finite")),
        ("base: {revision: 123}", ("base.revision", 'in quotes: "123"')),
        ("method: {type: lroa}", ("method.type", "lora")),
        ("cluster: {workers: {min: 3, max: 2}}", ("cluster.workers (run.yaml:1)", "min (3) is above max (2)")),
        ("cluster: {workers: {max: 2}}", ("cluster.workers.min (run.yaml:1): required: whole number at least 1",)),
        ("data: {train: []}", ("data.train (run.yaml:1)", "at least 1")),
        ("data: {train: [{weight: 2}]}", ("data.train.0.path (run.yaml:1): required: text",)),
        ("data:\n  train:\n  - demo\n  - path: demo\n    weight: -1", ("data.train.1.weight (run.yaml:5)", "above 0")),
        ("shard: 1\ncluster: {zero: {stage: 2}}", ("shard (run.yaml:1)", "cluster.zero.stage (run.yaml:2)")),
        ("shard: 1\ncluster: 5", ("mixes short forms",)),
        ("- a\n- b", ("a mapping of name, base",)),
        ("just text", ("a mapping of name, base",)),
        ("a: [1", ("not YAML", "run.yaml:")),
        ("a:\n\t- b", ("not YAML", "run.yaml:2")),
        ("name: \x00", ("not YAML",)),
        ("name: !!python/object/apply:os.getcwd []", ("name",)),
        ("train: &t {steps: 1, <<: *t}", ("holds itself",)),
        ("? [a]\n: b", ("a key has to be a word",)),
        ("a: 1\n---\nb: 2", ("run.yaml:2", "another document")),
    ],
)
def test_one_mistake(tmp_path, text, parts):
    line = one(tmp_path, text)
    assert all(part in line for part in parts), line


def test_aliases_of_aliases_end(tmp_path):
    text = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    assert any("far too large" in line for line in mistakes(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("method.rank", "key=value"),
        ("=3", "key=value"),
        ("method..rank=3", "key=value"),
        ("data.train.4.weight=2", "data.train is a list of 1"),
        ("data.train.first.weight=2", "data.train is a list of 1"),
        ("method.rank.high=2", "unknown key|got"),
        ("method.rnak=2", "perhaps method.rank"),
        ("trian.steps=2", "perhaps train"),
        ("data=*.jsonl", "quote the value"),
    ],
)
def test_wrong_override(tmp_path, override, part):
    line = one(tmp_path, "", override)
    assert override in line
    assert any(p in line for p in part.split("|")), line


def test_override_into_a_single_value_of_the_file(tmp_path):
    assert "it has no key 'high'" in one(tmp_path, "method: {rank: 4}", "method.rank.high=2")


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda p: p / "rum.yaml", "did you mean"),
        (lambda p: p / "no" / "x.yaml", "does not exist"),
        (lambda p: p, "is a directory"),
    ],
)
def test_file_that_cannot_be_read(tmp_path, make, part):
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=part):
        load_run(make(tmp_path))


def test_binary_file(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_run(tmp_path / "run.yaml")


def test_a_mistake_does_not_cause_another(tmp_path):
    """A wrong step count is one mistake, not also a streamed set without steps."""
    assert one(tmp_path, "data: {streaming: true}\ntrain: {steps: 0}").startswith("train.steps")
    assert one(tmp_path, "data: {streaming: true}\ntrain: {stepz: 5}").startswith("train.stepz")


# ---- what others build on


def test_reading_pulls_in_neither_torch_nor_ray(tmp_path):
    code = (
        "import sys, json; from orchestrator.config.load import load_run; load_run(sys.argv[1], ['method.rank=4']);"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(tmp_path, "name: quick"))], capture_output=True, text=True, check=True
    )
    print(f"a run read in a fresh process: {time.perf_counter() - started:.2f} s")
    loaded = set(json.loads(done.stdout))
    assert "pydantic" in loaded  # so the list is one of what was imported
    assert not loaded & {"torch", "ray", "transformers", "datasets", "mlflow", "deepspeed", "peft", "numpy"}


def test_records_survive_pickling_and_a_round_trip_through_yaml(tmp_path):
    run = load_run(None, ["cluster.workers=2", "data.train=[demo, {path: org/set, weight: 2}]", "shard=3"])
    assert pickle.loads(pickle.dumps(run)) == run
    assert load_run(write(tmp_path, yaml.safe_dump(run.model_dump(mode="json")))) == run


def validates(kind: str, text: str) -> bool:
    """An independent reading of the schema."""
    schema = json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    return not list(jsonschema.Draft202012Validator(schema).iter_errors(yaml.safe_load(text) or {}))


@pytest.mark.parametrize(
    ("kind", "text", "good"),
    [
        ("run", "", True),
        ("run", "base: demo\ndata: x.jsonl\ncluster: {workers: 2}\nshard: 3\nmethod: {targets: q_proj}", True),
        ("run", "data: {train: x.jsonl, eval: [y.jsonl, {path: z, weight: 2}]}", True),
        ("run", "base: {id: demo}\ncluster: {workers: {min: 1, max: 2}}", True),
        ("run", "base: 5", False),
        ("run", "cluster: {workers: 0}", False),
        ("run", "shard: 7", False),
        ("run", "rank: 3", False),
        ("run", "data: {trian: x}", False),
        ("serving", "base: demo\ndeltas: support", True),
        ("serving", "deltas: [a, b]\nport: 80", True),
        ("serving", "port: http", False),
        ("search", "methods: lora\nobjective: accuracy\nsampler: random\nscheduler: none\nbudget: 5", True),
        ("search", "methods: [lora, {type: prompt, tokens: {choice: [5]}, train.lr: {log: [0.1, 1]}}]", True),
        ("search", "methods: [{type: lora, targets: q_proj}]\ntask: classification\nshard: 3", True),
        ("search", "methods: [{type: lora, rank: {range: [5]}}]", False),
        ("search", "methods: [{type: lora, rnk: 5}]", False),
        ("search", "methods: [botleneck]", False),
        ("search", "objective: [speed]", False),
        ("search", "budget: 0", False),
    ],
)
def test_schema(kind, text, good):
    assert validates(kind, text) is good


@pytest.mark.parametrize(("kind", "model"), [("run", Run), ("search", Search), ("serving", Serving)])
def test_schema_describes_every_knob(kind, model):
    schema = json_schema(kind)
    parts = [schema, *(o for d in schema["$defs"].values() for o in (d, *d.get("anyOf", [])))]
    knobs = [(name, child) for part in parts for name, child in part.get("properties", {}).items()]
    assert set(model.model_fields) <= {name for name, _ in knobs}
    for name, child in knobs:
        # pydantic leaves out a description that equals the referred section's own
        section = schema["$defs"].get(child.get("$ref", "").rpartition("/")[2], {})
        assert child.get("description") or section.get("description"), name


def test_nearest():
    assert nearest("lerning_rate", ["learning_rate", "rank"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate", "rank"]) is None
