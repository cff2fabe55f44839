"""The pack bench's arithmetic: makespans and the share of steps that early stopping leaves."""

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs" / "bench"))

from pack_table import Found, asha_share, spans, table

ARGS = argparse.Namespace(
    sizes="1x512", slots="8,16", trial_steps=100, shapes="tiny", seconds=6.0, most=4, tiny=True, device_name="a GPU"
)
ROWS = [
    {"part": "peft-tiny", "what": "ready", "startup_s": 10.0},
    {"part": "peft-tiny", "what": "peft", "size": "1x512", "step_s": 0.5, "tokens_per_s": 1024.0, "tflops": 1.0},
    {"part": "ours-tiny", "what": "ready", "startup_s": 20.0},
    {"part": "ours-tiny", "what": "solo", "size": "1x512", "step_s": 0.4, "tokens_per_s": 1280.0, "tflops": 1.0},
    {"part": "ours-tiny", "what": "packed", "size": "1x512", "slots": 8, "step_s": 0.5, "join_s": 0.25,
     "tokens_per_s": 8192.0, "tflops": 8.0},
    {"part": "ours-tiny", "what": "packed", "size": "1x512", "slots": 16, "oom": "out of memory"},
    {"part": "many-tiny", "what": "many", "size": "1x512", "processes": 4, "step_s": 1.0, "tokens_per_s": 2048.0,
     "tflops": 2.0},
    {"part": "start-tiny", "what": "start", "startup_s": 29.0, "after_s": 1.0},
]  # fmt: skip


def test_makespans_are_steps_times_trials_and_start_up() -> None:
    a, b, c, d = spans(ARGS, Found("tiny", ROWS), "1x512", 16)
    assert a == pytest.approx(16 * (10 + 100 * 0.5))
    assert b == pytest.approx(16 * (30 + 100 * 0.4))
    assert c == pytest.approx(4 * (10 + 100 * 1.0))
    assert d == pytest.approx((20 + 16 * 0.25 + 2 * 100 * 0.5, 8))


def test_asha_leaves_a_third_at_each_rung() -> None:
    # 27 trials of 10 evaluations: all do 1, 9 go on to 3, 3 to 9, 1 to 10: 27 + 18 + 18 + 1 of 270.
    assert asha_share(1, 3) == pytest.approx(64 / 270)
    assert asha_share(10, 3) == 1.0


def test_a_table_says_what_does_not_fit_and_what_failed() -> None:
    text = table(ARGS, [*ROWS, {"part": "mixed-tiny", "failed": "no room"}])
    assert "| (d) pack of 8 | 8,192 | 8.00 | 4.00 |" in text
    assert "pack of 16 | does not fit: out of memory" in text
    assert "mixed-tiny FAILED: no room" in text
