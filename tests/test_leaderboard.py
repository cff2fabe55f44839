"""The leaderboard on a terminal and in a log, and that no terminal can hurt a search."""

import errno
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.leaderboard import Leaderboard, budget_left, spent
from orchestrator.search.study import Study
from tests.study_kit import study


def running(count: int = 24) -> Study:
    """A study whose last three trials are under way."""
    made = study(count, hostile=None)
    for row in list(made.rows.values())[-3:]:
        row.curves.clear()
        made.hear(row.trial, "joined", {"step": 10, "total": 40}, 1_700_000_900)
        made.hear(row.trial, "step", {"step": 12, "total": 40, "loss": 1.25, "tokens": 512}, 1_700_000_901)
    return made


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def screen(made: Study, height: int = 60) -> str:
    """What a terminal shows in the end."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, height=height, color_system=None, highlight=False)
    with Leaderboard(console) as board:
        board(made)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).rsplit("search orders on", 1)[1]


def test_a_terminal_shows_the_best_the_running_and_the_failed() -> None:
    made = running()
    said = screen(made)
    best = made.ranked()[0]
    lines = [line.split() for line in said.splitlines() if line.split()[:1] == ["1"]]
    assert lines[0][1] == str(best.number)
    assert f"{best.value('eval_loss'):.4f}" in lines[0]
    assert said.count("12/40") == 3
    assert "loss 1.2500" in said
    assert "3 running" in said
    assert f"{sum(row.state == 'failed' for row in made.rows.values())} failed" in said
    assert "the loss was not finite" in said
    assert f"{made.tokens:,} tokens" in said
    assert "left: 3 trials" in said


def test_it_fits_a_small_terminal() -> None:
    made = running(40)
    for row in list(made.rows.values())[:30]:
        made.hear(row.trial, "joined", {"step": 10, "total": 40}, 1_700_000_950)
    assert len(screen(made, height=24).splitlines()) <= 24


def test_the_rate_is_of_all_packs_over_the_last_seconds() -> None:
    clock, made = Clock(), running()
    console = Console(file=io.StringIO(), width=100)
    with Leaderboard(console, clock=clock) as board:
        board(made)
        assert board.tokens_per_s == 0.0  # what an earlier driver trained is no speed of this one
        clock.now += 10
        for row in list(made.rows.values())[-3:]:
            made.hear(row.trial, "step", {"step": 13, "total": 40, "loss": 1.2, "tokens": 1000}, 1_700_000_902)
        before = sum(r.tokens for r in made.rows.values())
        board(made)
    assert board.tokens_per_s == pytest.approx((before - board._tokens[0][1]) / 10)
    assert board.tokens_per_s > 0


def test_a_log_has_one_line_for_each_finished_trial() -> None:
    out = io.StringIO()
    made = study(0)
    with Leaderboard(Console(file=out, width=80)) as board:
        board(made)
        whole = study(24)
        for row in list(whole.rows.values()):
            made.rows[row.trial] = row
            board(made)
            board(made)
    lines = out.getvalue().splitlines()
    assert len(lines) == 24
    assert {int(re.search(r"trial (\d+)", line)[1]) for line in lines} == set(range(24))  # type: ignore[index]
    assert "\x1b" not in out.getvalue()
    assert any("stopped at step 20/40" in line for line in lines)


def test_trials_of_an_earlier_driver_are_not_told_again() -> None:
    out = io.StringIO()
    with Leaderboard(Console(file=out, width=80)) as board:
        board(study(24))
    assert out.getvalue() == ""


def test_hostile_words_do_not_reach_the_terminal() -> None:
    made = running()
    row = next(row for row in made.rows.values() if row.state == "failed")
    row.reason = "\x1b]0;owned\x07 [bold]x[/nonsense] at https://me:hunter2@example.test\nsecond"
    row.spans[-1].end = 2e9
    said = screen(made)
    assert "owned" in said
    assert "[bold]x[/nonsense]" in said
    assert "hunter2" not in said
    out = io.StringIO()
    with Leaderboard(Console(file=out, width=80)) as board:
        board(study(0))
        board(made)
    assert "\x1b" not in out.getvalue()
    assert "\x07" not in out.getvalue()


class Gone(io.StringIO):
    """A stream that fails as a closed terminal's does."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def write(self, text: str) -> int:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "gone"), ValueError("I/O operation on closed file")])
def test_a_stream_that_fails_is_given_up(error: Exception, terminal: bool) -> None:
    stream = Gone(error)
    with Leaderboard(Console(file=stream, force_terminal=terminal, width=80)) as board:
        board(study(0))
        board(study(12))
        first = stream.calls
        board(study(24))
        assert first == stream.calls > 0


SCRIPT = """
import os, sys, time
from orchestrator.leaderboard import Leaderboard
from tests.study_kit import study
with Leaderboard() as board:
    board(study(0))
    os.write(3, b"up")
    os.read(4, 1)
    board(study(12))
    time.sleep(0.3)
    board(study(24))
os.write(3, b"done")
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_closed_terminal_does_not_end_the_process(terminal: bool) -> None:
    """A real pseudo-terminal, or a real pipe, whose other end goes away."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    said, say = os.pipe()
    heard, tell = os.pipe()
    os.set_inheritable(say, True)
    os.set_inheritable(heard, True)
    setup = f"import os\nos.dup2({say}, 103); os.dup2({heard}, 104); os.dup2(103, 3); os.dup2(104, 4)\n"
    child = subprocess.Popen(
        [sys.executable, "-c", setup + SCRIPT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        pass_fds=(say, heard),
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    os.close(say)
    assert os.read(said, 10) == b"up"
    os.close(ours)
    os.write(tell, b"x")
    assert os.read(said, 10) == b"done"
    assert child.wait(timeout=60) == 0


def test_the_budget_is_told_as_it_is() -> None:
    made = study(24, hostile=None)
    budget = made.search.budget.model_copy(update={"trials": None, "tokens": 2 * made.tokens, "hours": 1.0})
    made.search = made.search.model_copy(update={"budget": budget})
    assert spent(made) == pytest.approx([0.5, made.active_seconds / 3600])
    assert f"{made.tokens:,} tokens" in budget_left(made)
