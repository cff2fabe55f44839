"""The leaderboard of a search while it runs: a table that changes on a terminal, a line a finished trial in a log."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.delta.redact import redact
from orchestrator.search.frozen import knobs, label
from orchestrator.search.study import Row, Study

_log = logging.getLogger(__name__)

_REDRAW_S = 0.25
_WINDOW_S = 20.0
"""Of the rate of tokens."""
_STYLES = {"finished": "green", "stopped": "yellow", "failed": "red", "running": "cyan", "queued": "dim"}
_CHROME = 12
"""Lines of the screen that are no trial."""
_MOST = 15
_ENDED = ("finished", "stopped", "failed")


class Leaderboard:
    """Hears a study after each change and shows it. A terminal that was closed costs the picture, never the search."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or _Terminal(stderr=True, highlight=False)
        self._clock = clock
        self._live: Live | None = None
        self._drawn = -_REDRAW_S
        self._told: set[str] = set()
        self._began = clock()
        self._tokens: deque[tuple[float, int]] = deque()
        self._last: Study | None = None
        self._gone = False

    def __enter__(self) -> "Leaderboard":
        self._began = self._clock()
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
            self._quietly(self._live.start)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            if self._last is not None:
                self._quietly(lambda: self._draw(self._last))  # type: ignore[arg-type]
            self._quietly(self._live.stop)
            self._live = None

    def __call__(self, study: Study) -> None:
        """Show it."""
        now = self._clock()
        if self._last is None and not self.console.is_terminal:
            self._told = {row.trial for row in study.rows.values() if row.state in _ENDED}  # of an earlier driver
        self._last = study
        self._tokens.append((now, study.tokens))
        while now - self._tokens[0][0] > _WINDOW_S:
            self._tokens.popleft()
        if self._live is None:
            self._quietly(lambda: self._lines(study))
        elif now - self._drawn >= _REDRAW_S:
            self._drawn = now
            self._quietly(lambda: self._draw(study))

    def _quietly(self, do: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            do()
        except (OSError, ValueError) as error:  # hung up, or the stream is closed
            self._gone = True
            _log.info("the leaderboard's terminal is gone: %s", error)

    @property
    def tokens_per_s(self) -> float:
        """Of all packs together, over the last seconds."""
        (begin, first), (end, last) = self._tokens[0], self._tokens[-1]
        return (last - first) / (end - begin) if end > begin else 0.0

    # -- a log

    def _lines(self, study: Study) -> None:
        for row in sorted(study.rows.values(), key=lambda row: row.number):
            if row.state in _ENDED and row.trial not in self._told:
                self._told.add(row.trial)
                self.console.print(self._line(study, row), soft_wrap=True)

    def _line(self, study: Study, row: Row) -> Text:
        of = f"/{study.search.budget.trials}" if study.search.budget.trials else ""
        said = f"[{len(self._told)}{of}] trial {row.number} {row.state}"
        if row.state == "stopped":
            said += f" at step {row.step}/{row.total}"
        values = "  ".join(f"{metric} {figure(metric, row.value(metric))}" for metric in study.metrics)
        said += f"  {safe(row.reason)}" if row.state == "failed" else f"  {values}"
        best = study.winner()
        crown = "  (best so far)" if best is row else ""
        return Text(f"{said}  {point(row)}{crown}")

    # -- a terminal

    def _draw(self, study: Study) -> None:
        assert self._live is not None
        self._live.update(Group(*self._screen(study)), refresh=True)

    def _screen(self, study: Study) -> Iterable[Any]:
        rows = list(study.rows.values())
        running = sorted((row for row in rows if row.state == "running"), key=lambda row: row.number)
        failed = [row for row in rows if row.state == "failed"]
        ranked = [row for row in study.ranked() if row.value(study.metrics[0]) is not None and row.state != "failed"]
        room = max(6, self.console.height - _CHROME)
        most_running = min(len(running), room // 2)
        yield Text(f"search {study.search.name} on {safe(study.search.base.id)}", style="bold")
        yield self._status(study, rows, len(running), len(failed))
        yield _best(study, ranked, room - most_running)
        if running:
            yield _running(running, most_running)
        if failed:
            last = max(failed, key=lambda row: row.spans[-1].end if row.spans else 0.0)
            yield Text(
                f"trial {last.number} failed: {safe(last.reason)}", style="red", no_wrap=True, overflow="ellipsis"
            )

    def _status(self, study: Study, rows: list[Row], running: int, failed: int) -> Table:
        budget, ended = study.search.budget, sum(row.state in _ENDED for row in rows)
        elapsed = self._clock() - self._began
        said = [f"{ended}{f'/{budget.trials}' if budget.trials else ''} trials", f"{running} running"]
        said.append(f"{failed} failed")
        said.append(f"{study.tokens:,}{f'/{budget.tokens:,}' if budget.tokens else ''} tokens")
        said += [f"{self.tokens_per_s:,.0f} tok/s", clock_face(elapsed)]
        if left := budget_left(study):
            said.append(left)
        line = Table.grid(padding=(0, 1))
        share = max(spent(study), default=0.0)
        line.add_row(ProgressBar(total=1.0, completed=min(1.0, share), width=24), Text("  ".join(said)))
        return line


class _Terminal(Console):
    """Rich's console ends the program on a closed pipe; a search goes on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("closed")


def spent(study: Study) -> list[float]:
    """Share of each part of the budget that is spent."""
    budget = study.search.budget
    ended = sum(row.state in _ENDED for row in study.rows.values())
    hours = study.active_seconds / 3600
    parts = ((budget.trials, ended), (budget.tokens, study.tokens), (budget.hours, hours))
    return [used / whole for whole, used in parts if whole]


def budget_left(study: Study) -> str:
    """What is left of it, in words."""
    budget = study.search.budget
    ended = sum(row.state in _ENDED for row in study.rows.values())
    left = [f"{max(0, budget.trials - ended)} trials"] if budget.trials else []
    if budget.tokens:
        left.append(f"{max(0, budget.tokens - study.tokens):,} tokens")
    if budget.hours:
        left.append(clock_face(max(0.0, 3600 * budget.hours - study.active_seconds)))
    return f"left: {', '.join(left)}" if left else ""


def _best(study: Study, ranked: list[Row], most: int) -> Table:
    table = Table(box=None, padding=(0, 1), title=f"best by {study.metrics[0]}", title_justify="left")
    for name in ("", "trial", "state", *study.metrics):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    table.add_column("config", overflow="ellipsis", no_wrap=True)
    for rank, row in enumerate(ranked[: min(most, _MOST)], 1):
        values = [figure(metric, row.value(metric)) for metric in study.metrics]
        state = Text(row.state, style=_STYLES[row.state])
        table.add_row(str(rank), str(row.number), state, *values, Text(point(row)), style="bold" if rank == 1 else "")
    if not ranked:
        table.add_row("", "", Text("no trial was evaluated yet", style="dim"))
    return table


def _running(rows: list[Row], most: int) -> Table:
    more = f", {most} of {len(rows)} shown" if most < len(rows) else ""
    table = Table(box=None, padding=(0, 1), show_header=False, title=f"running{more}", title_justify="left")
    table.add_column(justify="right")
    table.add_column(width=20)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True)
    for row in rows[:most]:
        bar = ProgressBar(total=max(1, row.total), completed=row.step, width=20)
        loss = figure("loss", row.value("loss"))
        table.add_row(str(row.number), bar, f"{row.step}/{row.total}", f"loss {loss}", Text(point(row)))
    return table


def point(row: Row) -> str:
    """A trial's knobs in one line."""
    said = knobs(row)
    rest = " ".join(f"{safe(key)}={_short(value)}" for key, value in said.items() if key != "method")
    return f"{safe(label(row))} {rest}".strip()


def figure(metric: str, value: float | None) -> str:
    """A value for a table."""
    if value is None:
        return "-"
    return (
        f"{value:,}"
        if metric == "parameters"
        else f"{value:.4g}"
        if metric in ("memory", "latency")
        else f"{value:.4f}"
    )


def safe(text: str) -> str:
    """One line that leaves the terminal alone, without credentials."""
    return "".join(c if c.isprintable() else " " for c in redact(text))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else safe(str(value))


def clock_face(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
