"""Progress of a run: a bar on a terminal, plain lines in a log."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_S = 10.0


class ProgressPrinter:
    """Hears a run's events and shows them."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._task: Any = None
        self._last = 0.0
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "ProgressPrinter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        """Show one event."""
        if kind == "step":
            self._step(values)
        elif kind in _LINES:
            self._bar.console.print(_LINES[kind](values), highlight=False)

    def _step(self, v: dict[str, Any]) -> None:
        figures = f"loss {v['loss']:.4f}  {v['tokens_per_s']:,.0f} tok/s  {v['memory_gib']:.1f} GiB"
        if self._task is None:
            self._task = self._bar.add_task("train", total=v["total"], figures=figures)
        self._bar.update(self._task, completed=v["step"], figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._last > _LINE_S or v["step"] == v["total"]):
            self._last = now
            left = (v["total"] - v["step"]) * v["seconds_per_step"]
            self.console.print(f"step {v['step']}/{v['total']}  {figures}  {_clock(left)} left", highlight=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _data(v: dict[str, Any]) -> str:
    cut = f", {v['truncated']} truncated" if v.get("truncated") else ""
    cut += f", {v['dropped']} dropped (nothing left to learn)" if v.get("dropped") else ""
    skipped = f", {v['skipped']} bad records skipped" if v.get("skipped") else ""
    return (
        f"data: {v.get('samples') or 'streamed'} samples, {v.get('tokens', 0):,} tokens, "
        f"{v.get('trained_tokens', 0):,} trained{cut}{skipped}"
    )


def _plan(v: dict[str, Any]) -> str:
    how = {3: "sharded over them (ZeRO-3)", 0: "replicated"}.get(
        v["stage"], f"replicated, ZeRO-{v['stage']} on the delta"
    )
    return f"base: {v['parameters'] / 1e6:,.1f} M parameters on {v['ranks']} worker(s), {how}"


def _loaded(v: dict[str, Any]) -> str:
    here, total, alive = (v[key] / 2**20 for key in ("bytes_here", "bytes_total", "gathered_alive"))
    gathered = f", {alive:,.1f} MiB still gathered after a forward pass" if v["stage"] == 3 else ""
    return (
        f"base: loaded in {v['seconds']:.1f} s, {here:,.1f} of {total:,.1f} MiB on the first worker, "
        f"{v['quantized_fraction']:.0%} of the layers quantized{gathered}"
    )


def _eval(v: dict[str, Any]) -> str:
    rest = "".join(f"  {name} {v[name]:.4f}" for name in ("accuracy", "f1", "mcc") if name in v)
    return f"step {v['step']}  eval loss {v['eval_loss']:.4f}{rest}  (best at step {v['best_step']})"


def _warning(v: dict[str, Any]) -> str:
    return f"[yellow]warning: {v['text']}[/yellow]"


_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "data": _data,
    "plan": _plan,
    "loaded": _loaded,
    "warning": _warning,
    "eval": _eval,
    "done": lambda v: f"training {v['why']} at step {v['step']}",
}
