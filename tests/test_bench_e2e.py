import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config import Run
from orchestrator.config.load import load_run
from orchestrator.train.schedule import lr_at

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "jobs" / "bench"
FOOD = ("French", "Indian", "English", "Italian", "£20-25", "Café")


@pytest.fixture
def bench(monkeypatch):
    """The scripts as modules; their settings of the environment are undone."""
    for key in (
        "HF_HUB_OFFLINE",
        "OMP_WAIT_POLICY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
    ):
        monkeypatch.setenv(key, "1")
    monkeypatch.syspath_prepend(str(BENCH))
    import e2e
    import e2e_report

    return e2e, e2e_report


@pytest.fixture
def e2e_set(tmp_path):
    """A set in the layout of E2E NLG."""
    folder = tmp_path / "set"
    folder.mkdir()
    made = [
        (f"name[The Mill {i}], food[{food}]", f"The Mill {i} serves {food} food.") for i in range(8) for food in FOOD
    ]
    train = [{"prompt": p, "completion": c} for p, c in made]
    test = [{"prompt": p, "completion": c, "references": [c, f"{c} Go!"][: 1 + i % 2]} for i, (p, c) in enumerate(made)]
    for name, records in (("train_10k", train), ("test_grouped", test)):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_the_shipped_run_takes_the_set_by_override(e2e_set):
    run = load_run(ROOT / "jobs/runs/e2e.yaml", [f"data.train={e2e_set / 'train_10k.jsonl'}"])
    assert (run.base.quantize, run.cluster.zero.stage, run.cluster.workers.max) == ("nf4", 3, 2)
    assert not run.data.eval
    assert not run.data.eval_fraction  # else the best delta would be taken, which peft's side does not do


def test_both_sides_have_the_same_learning_rates(bench):
    e2e, _ = bench
    train = Run.model_validate({"train": {"lr": 1e-3, "warmup": 0.1, "min_lr": 0.2}}).train
    for step in range(50):
        assert math.isclose(train.lr * e2e.share(train, step, 50), lr_at(train, step, 50), rel_tol=1e-12)


def test_padding_is_neither_seen_nor_learnt(bench):
    e2e, _ = bench
    ids, mask, labels = e2e.collate([([5, 6, 7], [0, 1, 1]), ([8], [1])], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert labels.tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_bleu_takes_the_nearest_of_several_references(bench):
    _, report = bench
    records = [
        {"references": ["The Mill serves French food.", "French food is at The Mill."]},
        {"references": ["It is cheap ."]},
    ]
    score, signature = report.bleu(["French food is at The Mill.", "It is cheap ."], records)
    assert score == pytest.approx(100)
    assert "nrefs:var" in signature
    assert report.bleu(["Something else entirely, and long.", "No."], records)[0] < 10


def test_a_difference_too_large_is_called_so(bench):
    _, report = bench
    assert "; within 0.5" in report.verdict([0.1, -0.4], [0, 1])
    assert "**not** within 0.5: -0.70" in report.verdict([0.1, -0.7], [0, 1])


def test_the_command_in_the_report_names_no_folder(bench):
    e2e, _ = bench
    said = e2e.shown(["--data", "somewhere/else", "--out=there", "--seeds", "0", "1"])
    assert said == ["--data", "DIR", "--out=DIR", "--seeds", "0", "1"]


@pytest.mark.slow
def test_the_bench_from_end_to_end(e2e_set, tmp_path):
    argv = [sys.executable, str(BENCH / "e2e.py"), "--data", str(e2e_set), "--out", str(tmp_path / "out")]
    argv += ["--report", str(tmp_path / "e2e.md"), "--prompts", "8", "--set", "train.steps=8", "train.batch_size=4"]
    first = subprocess.run(argv, capture_output=True, text=True, timeout=500)
    assert first.returncode == 0, first.stderr[-3000:]
    ours, theirs = (json.loads((tmp_path / "out" / f"{side}-0.json").read_text()) for side in ("ours", "theirs"))
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["lrs"] == pytest.approx(theirs["lrs"])
    text = (tmp_path / "e2e.md").read_text()
    assert "## Samples" in text
    assert str(tmp_path) not in text
    again = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert again.stdout.count(": kept") == 6
    assert (tmp_path / "e2e.md").read_text() == text
