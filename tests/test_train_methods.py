"""Each method through a whole run: it learns, packing changes no loss, and a resumed run has the same bits."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.launch_kit import Folder, assert_same_bits, small, train_here, weights

RUNS = {
    "prompt": "method={type: prompt, tokens: 5, start: text, text: the cat}",
    "prefix": "method={type: prefix, tokens: 5, std: 0.3}",
    "houlsby": "method={type: bottleneck, size: 4, placement: houlsby, activation: silu}",
    "parallel": "method={type: bottleneck, size: 4, placement: parallel, dropout: 0.2, scale: 4}",
}
"""Overrides of a run; a method of more kinds is a line more."""
RECORDS = [{"prompt": "the cat" * n, "completion": " sat on the mat" * (1 + n % 3)} for n in range(1, 7)]


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_learns_and_neither_packing_nor_a_resume_changes_it(kind: str, tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    data = tmp_path / "few.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS)))
    assert sum(len(tiny.tokenizer()(r["prompt"] + r["completion"]).input_ids) + 8 for r in RECORDS) < 2 * 128

    def run(name: str, *how: str, stop_at: int | None = None) -> Folder:
        settings = (f"base={base}", f"data.train={data}", "data.chat=never", "train.batch_size=6", "train.lr=0.03")
        asked = small(*settings, RUNS[kind], "train.steps=4", "train.warmup=0", *how)
        return train_here(asked, tmp_path / name, stop_at=stop_at)

    whole = run("whole")
    losses = whole.of("step", "loss")
    assert whole.of("warning", "text") == [], "rows of several samples, not of one each"
    assert losses[-1] < losses[0] - 0.02
    apart = run("apart", "data.packing=false", "train.recompute=true")
    assert apart.of("step", "loss") == pytest.approx(losses, rel=1e-5)
    first = run("parts", stop_at=2)
    second = run("parts")
    assert first.of("step", "loss") + second.of("step", "loss") == losses
    assert whole.latest is not None
    assert second.latest is not None
    assert_same_bits(weights(whole.latest / "delta" / "delta"), weights(second.latest / "delta" / "delta"))
