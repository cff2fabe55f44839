"""Reading a search: what is accepted, and that every mistake is said at its place, with what would be right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config import Search
from orchestrator.config.load import load_search
from orchestrator.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(text)
    return path


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error; fails where there is none."""
    with pytest.raises(ConfigError) as caught:
        load_search(write(tmp_path, text), overrides)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{len(lines)} mistake")
    return [line.strip().replace(str(tmp_path) + "/", "") for line in lines]


# ---- what is accepted


def test_nothing_at_all_is_a_search():
    assert load_search() == Search()


def test_methods_alone_are_a_search(tmp_path):
    search = load_search(write(tmp_path, "methods: [lora, bottleneck, prompt]\n"))
    assert [entry["type"] for entry in search.methods] == ["lora", "bottleneck", "prompt"]
    assert search.data.eval_fraction > 0


def test_short_forms(tmp_path):
    text = (
        "methods: {rank: 8}\nsampler: random\nscheduler: none\nbudget: 7\nshard: 3\n"
        "objective: [eval_loss, parameters]\ndata: {eval_fraction: 0.1}\ntask: causal_lm\n"
    )
    search = load_search(write(tmp_path, text))
    assert search.methods == ({"type": "lora", "rank": 8},)
    assert (search.sampler.type, search.scheduler.type, search.budget.trials) == ("random", "none", 7)
    assert [o.metric for o in search.objective] == ["eval_loss", "parameters"]
    assert search.cluster.zero.stage == 3


def test_dotted_and_nested_keys_are_the_same(tmp_path):
    dotted = load_search(write(tmp_path, "space: {train.lr: {log: [1e-4, 1e-2]}, data.length: {choice: [64, 128]}}"))
    nested = load_search(
        write(tmp_path, "space: {train: {lr: {log: [1e-4, 1e-2]}}, data: {length: {choice: [64, 128]}}}")
    )
    assert dotted == nested


def test_overrides_reach_ranges(tmp_path):
    path = write(tmp_path, "methods: [lora, {type: prompt, tokens: 5}]\nspace: {train.lr: {log: [1e-4, 1e-2]}}\n")
    search = load_search(
        path, ["space.train.lr={choice: [1e-3]}", "methods.1.tokens={choice: [5, 9]}", "methods.2=ia3", "budget=3"]
    )
    assert search.space == {"train": {"lr": {"choice": [1e-3]}}}
    assert search.methods[1]["tokens"] == {"choice": [5, 9]}
    assert search.methods[2] == {"type": "ia3"}
    assert search.budget.trials == 3


def test_what_is_left_out_stays_so_through_json(tmp_path):
    given = load_search(write(tmp_path, "train: {batch_size: 16}\ndata: {eval_fraction: 0.1}\nmethods: [lora, ia3]\n"))
    for search in (given, Search()):
        again = Search.model_validate(json.loads(json.dumps(search.model_dump(mode="json"))))
        assert again == search
        assert again.train.model_fields_set == search.train.model_fields_set
        assert again.data.model_fields_set == search.data.model_fields_set


@pytest.mark.parametrize(
    "text",
    [
        "methods: [{type: lora, rank: {int: [4, 64]}}, {type: lora, rank: {log_int: [4, 64]}, rslora: true}]",
        "methods: [{type: lora, dropout: {uniform: [0, 0.2]}, alpha: {choice: [8, 16]}}]",
        "methods: [{type: lora, dora: {choice: [true, false]}, start: {choice: [zero, pissa]}}]",  # some pairs are good
        "methods: [{type: lora, targets: {choice: [all-linear, [q_proj, v_proj]]}}]",
        "methods: [{type: lora, ranks: {q_proj: {choice: [4, 8]}}}]",
        "methods: [{peft: {type: VERA, r: {choice: [64, 128]}}}]\nbase: {quantize: none}",
        "methods: [full, {type: last_layers, train.lr: {log: [1e-5, 1e-3]}}]\nbase: {quantize: none}",
        "budget: {trials: null, hours: 1}",
        "budget: {trials: null}\nsampler: grid",
        "sampler: grid\nbudget: 500",
        "objective: loss\nscheduler: none\ndata: demo",
        "space: {train.seed: {choice: [0, 1]}}\ndata: {eval: demo}",
        "packs: {slots: 4, count: 1}",
    ],
)
def test_accepted(tmp_path, text):
    load_search(write(tmp_path, text))


# ---- every mistake


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        # methods
        ("methods: []", "methods (search.yaml:1)", "at least 1"),
        ("methods: [botleneck]", "methods.0.type", 'got "botleneck"; allowed: one of lora, full, last_layers'),
        ("methods: [botleneck]", "methods.0.type", "nearest: bottleneck"),
        ("methods:\n  - ia3\n  - {type: lora, rnk: 4}", "methods.1.rnk (search.yaml:3)", "perhaps method.rank"),
        ("methods: [{type: lora, rnk: {choice: [4]}}]", "methods.0.rnk", "unknown key"),
        ("methods: [{type: prompt, rank: 4}]", "methods.0.rank", "unknown key"),
        ("methods: [{type: lora, rank: 0}]", "methods.0.rank", "got 0; allowed: whole number at least 1"),
        ("methods: [{type: lora, rank: {choice: [8, 0]}}]", "methods.0.rank", "choice 0: got 0; allowed: whole number"),
        ("methods: [{type: lora, rank: {int: [0, 8]}}]", "methods.0.rank", "low end 0: got 0"),
        ("methods: [{type: lora, rank: {int: [8, 9999]}}]", "methods.0.rank", "high end 9999: got 9999"),
        ("methods: [{type: lora, rank: {log: [4, 64]}}]", "methods.0.rank", "write {log_int: [4, 64]}"),
        ("methods: [{type: bottleneck, placement: {choice: [pfeifer]}}]", "methods.0.placement", "nearest: pfeiffer"),
        ("methods: [{type: lora, rank: {choice: []}}]", "methods.0.rank", "is empty"),
        ("methods: [{type: lora, rank: {choice: [4, 4]}}]", "methods.0.rank", "names 4 twice"),
        ("methods: [{type: lora, rank: {choice: 4}}]", "methods.0.rank", "takes a list"),
        ("methods: [{type: lora, rank: {int: [8, 4]}}]", "methods.0.rank", "low end 8 is not below the high end 4"),
        ("methods: [{type: lora, rank: {int: [8, 8]}}]", "methods.0.rank", "not below"),
        ("methods: [{type: lora, rank: {int: [4.5, 8]}}]", "methods.0.rank", "takes whole numbers"),
        ("methods: [{type: sparse, density: {log: [0, 0.1]}}]", "methods.0.density", "above 0"),
        ("methods: [{type: sparse, density: {log: [0.1]}}]", "methods.0.density", "takes a low and a high number"),
        (
            "methods: [{type: sparse, density: {log: [0.1, .inf]}}]",
            "methods.0.density",
            "takes a low and a high number",
        ),
        ("methods: [{type: lora, rank: {choice: [4], int: [1, 2]}}]", "methods.0.rank", "alone"),
        (
            "methods: [{type: lora, dora: true, start: {choice: [zero, pissa]}}]",
            "methods.0.start",
            "exclude each other",
        ),
        ("methods: [lora, ia3, lora]", "methods.2", "the same as methods.0"),
        ("methods: [full]", "methods.0", "base.quantize: method full trains every weight"),
        ("methods: [{peft: {type: VERA}}]", "methods.0", "base.quantize: nf4: method peft needs a dense base"),
        ("methods: [{type: lora, train.lr: 0}]", "methods.0.train.lr", "got 0; allowed: number above 0"),
        ("methods: [{type: lora, train.lr: {log: [1, -1]}}]", "methods.0.train.lr", "not below"),
        ("methods: [{type: lora, train.steps: 5}]", "methods.0.train", "for lr alone"),
        ("methods: [{type: lora, train.lr: 1}]\ntrain: {lr: 1e-3}", "methods.0.train.lr", "keep one"),
        ("methods: [{type: lora, train.lr: 1}]\nspace: {train.lr: {choice: [1]}}", "methods.0.train.lr", "keep one"),
        # space
        ("space: {train.lrr: {choice: [1]}}", "space.train.lrr (search.yaml:1)", "perhaps train.lr"),
        ("space: {lr: {choice: [1]}}", "space.lr", "perhaps train.lr"),
        ("space: {train.lr: {log: [-1, 1]}}", "space.train.lr", "above 0"),
        ("space: {train.batch_size: {choice: [0, 4]}}", "space.train.batch_size", "choice 0: got 0"),
        ("space: {train.batch_size: {uniform: [4, 16]}}", "space.train.batch_size", "write {int: [4, 16]}"),
        ("space: {train.batch_size: [4, 8]}", "space.train.batch_size", "a list to choose from is {choice: [4, 8]}"),
        ("space: {train.batch_size: 4}", "space.train.batch_size", "stands outside space: train.batch_size"),
        ("space: {train.lr: {lgo: [1, 2]}}", "space.train.lr.lgo", "nearest: log"),
        ("space: {train.lr: {choice: [1]}, train: {lr: {choice: [2]}}}", "space.train.lr", "given twice"),
        ("space: {train.lr: {choice: [1]}}\ntrain: {lr: 2}", "space.train.lr", "keep one of the two"),
        ("space: {base.id: {choice: [a, b]}}", "space.base.id", "share one base"),
        ("space: {cluster.workers: {choice: [1, 2]}}", "space.cluster.workers", "share one base"),
        ("space: {tracking.experiment: {choice: [a]}}", "space.tracking.experiment", "are one study"),
        ("space: {name: {choice: [a]}}", "space.name", "named after the search"),
        ("space: {method.rank: {choice: [4]}}", "space.method.rank", "in its entry of methods"),
        ("space: {train.init_from: {choice: [a]}}", "space.train.init_from", "fits no trial of another"),
        ("space: {train.metric: {choice: [loss]}}", "space.train.metric", "compared on the same held-out"),
        ("space: {train.recompute: {choice: [true]}}", "space.train.recompute", "changes nothing that is learnt"),
        ("space: {train.seed: {choice: [1, 2]}}", "space.train.seed", "hold out other records"),
        ("space: {data.train.0.weight: {choice: [a]}}", "space.data.train.0.weight", "hold out other records"),
        ("space: {data.train.4.weight: {choice: [1]}}\ndata: {eval: demo}", "space.data.train.4.weight", "a list of 1"),
        # grid, budget, objective, scheduler, packs
        ("sampler: grid\nspace: {train.lr: {log: [1e-4, 1e-3]}}", "space.train.lr", "list the values with choice"),
        (
            "sampler: grid\nmethods: [{type: lora, dropout: {uniform: [0, 0.1]}}]",
            "methods.0.dropout",
            "list the values with choice",
        ),
        ("sampler: gird", "sampler.type", "nearest: grid"),
        ("budget: {trials: null}", "budget", "would never end"),
        ("budget: 0", "budget.trials", "at least 1"),
        ("budget: {tokens: 0}", "budget.tokens", "at least 1"),
        ("budget: {hours: 0}", "budget.hours", "above 0"),
        ("budget: {hours: .inf}", "budget.hours", "finite"),
        ("objective: []", "objective", "at least 1"),
        ("objective: eval_los", "objective.0.metric", "nearest: eval_loss"),
        ("objective: [eval_loss, eval_loss]", "objective.1.metric", "already objective.0"),
        ("objective: accuracy", "objective.0.metric", "task: classification"),
        ("objective: [parameters, f1]", "objective.1.metric", "task: classification"),
        ("data: demo", "objective.0.metric", "give data.eval (held-out records) or data.eval_fraction"),
        ("objective: loss", "scheduler.type", "asha compares trials on a held-out metric"),
        ("objective: [parameters]\nscheduler: median", "scheduler.type", "median compares"),
        ("packs: {slots: 0}", "packs.slots", "whole number at least 1"),
        ("packs: {count: 0}", "packs.count", "whole number at least 1"),
        # what holds of a run holds of every trial
        ("train: {init_from: support@champion}", "train.init_from", "fits no trial of another"),
        ("data: {train: nowhere.jsonl, eval_fraction: 0.1}", "data.train.0.path", "does not exist"),
        ("train: {lr: 0}", "train.lr", "above 0"),
        ("serch: 1", "serch", "unknown key"),
    ],
)
def test_a_mistake_is_said(tmp_path, text, where, said):
    (line,) = mistakes(tmp_path, text)
    assert line.startswith(where), line
    assert said in line


def test_a_classification_needs_held_out_records(tmp_path):
    (tmp_path / "my.jsonl").touch()
    lines = mistakes(tmp_path, f"task: classification\nobjective: mcc\ndata: {tmp_path}/my.jsonl\n")
    assert [line.split(" ")[0] for line in lines] == ["objective.0.metric"]
    assert "mcc needs held-out records" in lines[0]


def test_fisher_is_a_choice_of_a_classification_too(tmp_path):
    (tmp_path / "my.jsonl").touch()
    path = tmp_path / "search.yaml"
    path.write_text(
        f"task: classification\ndata: {{train: {tmp_path}/my.jsonl, eval_fraction: 0.1}}\n"
        "methods: [{type: sparse, choose: {choice: [magnitude, fisher]}}]\n"
    )
    assert load_search(path).methods[0]["choose"] == {"choice": ["magnitude", "fisher"]}


def test_all_mistakes_at_once_each_at_its_line(tmp_path):
    text = (
        "methods:\n  - {type: lora, rank: {choice: [0, 8]}}\n  - nothing\nspace:\n  train.lrr: {choice: [1]}\n"
        "objective:\n  - speed\npacks: {slots: 0}\n"
    )
    lines = mistakes(tmp_path, text, "budget=0")
    assert [line.split(":")[1].split(")")[0] for line in lines[:-1]] == ["2", "3", "5", "7", "8"]
    assert "override 'budget=0'" in lines[-1]


def test_what_is_wrong_for_all_trials_is_said_once(tmp_path):
    text = (
        "data: {train: nowhere.jsonl, eval_fraction: 0.1}\nspace: {train.warmup: {uniform: [0, 0.1]}}\n"
        "methods: [full, {type: lora, rank: {choice: [4]}, train.lr: {log: [1e-4, 1e-3]}}]\nbase: {quantize: none}\n"
    )
    (line,) = mistakes(tmp_path, text)
    assert line.startswith("data.train.0.path")


def test_the_command_prints_the_schema():
    code = "from orchestrator.cli import main; import sys; sys.argv = ['manta', 'schema', 'search']; main()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "methods" in json.loads(out)["properties"]
