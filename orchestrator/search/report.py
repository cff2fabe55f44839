"""A search's report: one HTML file with everything in it, that opens anywhere and fetches nothing."""

import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from orchestrator.config import Run
from orchestrator.delta.redact import redact, redacted
from orchestrator.search import figures
from orchestrator.search.frozen import FEWEST, judged, knobs, label
from orchestrator.search.study import Row, Study

_TEMPLATE = Path(__file__).parents[1] / "assets" / "report.html"
_FEW = 40
"""Judged trials below which importances are a hint."""


def write_report(study: Study, path: Path) -> Path:
    """The study as an HTML page with plotly inside; the same study gives the same bytes.

    Raises:
        OSError: the file cannot be written; the one that was there before stays.
    """
    body = "\n".join((_head(study), _winner(study), _leaderboard(study), *_plots(study)))
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=f"{escape(study.search.name)} · search", plotly=get_plotlyjs(), body=body
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


# ---- words


def _head(study: Study) -> str:
    search, budget = study.search, study.search.budget
    hours = f" of {_clock(3600 * budget.hours)}" if budget.hours else ""
    counts = {state: sum(row.state == state for row in study.rows.values()) for state in figures.STATES}
    facts = {
        "base": search.base.id,
        "trials": f"{len(study.rows)}{f' of {budget.trials}' if budget.trials else ''}",
        "of these": ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none yet",
        "training tokens": f"{study.tokens:,}{f' of {budget.tokens:,}' if budget.tokens else ''}",
        "time": f"{_clock(study.active_seconds)}{hours}",
        "objective": ", ".join(study.metrics),
        "sampler, scheduler": f"{search.sampler.type}, {search.scheduler.type}",
        "ended": study.over or "not yet",
    }
    return f"<h1>Search {escape(search.name)}</h1>\n{_facts(facts)}"


def _winner(study: Study) -> str:
    row = study.winner()
    if row is None:
        return '<p class="note">No trial has a result yet, so there is no winner.</p>'
    facts = {
        "winner": f"trial {row.number}",
        "method": row.method,
        **{metric: _value(row, metric) for metric in dict.fromkeys((*study.metrics, *sorted(row.metrics)))},
        "trained parameters": _value(row, "parameters"),
        "at step": f"{row.best_step} of {row.total}",
    }
    return (
        f'<div class="winner">{_facts(facts)}\n<details open><summary>its run, to train it again: save it as '
        f"<code>winner.yaml</code>, then <code>manta train winner.yaml</code></summary>\n"
        f"<pre>{escape(run_file(row.run))}</pre></details></div>"
    )


def run_file(run: Mapping[str, Any]) -> str:
    """A trial's config as YAML, without what is the default anyway and without credentials."""
    whole = Run.model_validate(run)
    kept = whole.model_dump(mode="json", exclude_defaults=True)
    for section in ("method", "task"):  # told apart by their type, which a default does not show
        if section in kept or getattr(whole, section) != Run.model_fields[section].default:
            kept[section] = {"type": getattr(whole, section).type, **kept.get(section, {})}
    return "".join(_yaml(redacted(kept)))


def _yaml(values: Mapping[str, Any], indent: str = "") -> Iterable[str]:
    """Nested mappings as lines; JSON's scalars and lists are YAML, and quote anything."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:\n"
            yield from _yaml(value, indent + "  ")
        else:
            yield f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}\n"


def _leaderboard(study: Study) -> str:
    metrics = [
        m for m in dict.fromkeys((*study.metrics, *_seen(study))) if m not in ("parameters", "memory", "latency")
    ]
    columns = ("rank", "trial", "state", "method", *metrics, "step", "trained", "memory MiB", "latency ms", "tokens")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (*columns, "seconds", "config"))
    best = study.winner()
    rows = []
    for rank, row in enumerate(study.ranked(), 1):
        place = rank if row.value(study.metrics[0]) is not None and row.state != "failed" else None
        color = figures.STATES[row.state]
        state = (
            f'<td data-value="{escape(row.state)}"><span class="state" style="background:{color}">{row.state}</span>'
        )
        cells = [_number(place), _number(row.number), f"{state}</td>", _text(label(row))]
        cells += [_number(row.value(metric), "{:.4f}") for metric in metrics]
        cells += [_number(row.step, f"{{:,}} / {row.total:,}"), _number(row.parameters, "{:,}")]
        cells += [_number(row.memory and row.memory / 2**20, "{:,.1f}"), _number(_ms(row.latency), "{:.2f}")]
        cells += [_number(row.tokens, "{:,}"), _number(row.seconds, "{:.1f}")]
        point = ", ".join(f"{key} = {figures.said(value)}" for key, value in knobs(row).items())
        cells.append(_config(point, redact(row.reason)))
        kind = ' class="best"' if row is best else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    note = "A click on a column's head sorts by it. Metrics are those of a trial's best evaluation."
    return (
        f'<h2>Leaderboard</h2>\n<p class="note">{note}</p>\n<div class="scroll"><table id="leaderboard"><thead><tr>'
        f"{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _seen(study: Study) -> list[str]:
    return sorted({name for row in study.rows.values() for name in row.metrics})


# ---- pictures


def _plots(study: Study) -> Iterable[str]:
    none = "Nothing to show yet."
    yield _plot("curves", "Learning curves", figures.learning_curves(study), none)
    pareto = figures.pareto(study)
    note = "The dashed line joins the trials that no other one beats in both."
    for other, figure in pareto.items():
        yield _plot(f"pareto-{other}", f"{study.metrics[0]} against {other}", figure, none, note)
    if not pareto:
        yield _plot("pareto", f"{study.metrics[0]} against size", None, none)
    parallel = "A line a trial; a knob that a method does not have is None. Failed trials are left out."
    few = "It takes two judged trials and a knob that differs."
    yield _plot("parallel", "Parallel coordinates", figures.parallel_coordinates(study), few, parallel)
    count = len(judged(study))
    hint = f" {count} trials are few: take it as a hint." if count < _FEW else ""
    why = f"How well a knob tells the best quarter of the trials from the rest (PED-ANOVA).{hint}"
    too_few = (
        f"{count} trials with a result are too few to tell which knobs matter; it takes {FEWEST}."
        if count < FEWEST
        else "No knob was searched."
    )
    yield _plot("importance", "What mattered", figures.importance(study), too_few, why)
    stays = "A line a slot of a pack, a bar a trial's stay in it, with its number."
    yield _plot("timeline", "Packs and slots", figures.timeline(study), none, stays)


def _plot(name: str, title: str, figure: Any, instead: str, note: str = "") -> str:
    said = note if figure is not None else instead
    shown = f'<p class="note">{escape(said)}</p>\n' if said else ""
    drawn = ""
    if figure is not None:
        config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
        drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot-{name}", config=config)
    return f'<h2>{escape(title)}</h2>\n{shown}<div class="plot">{drawn}</div>'


# ---- cells


def _facts(facts: Mapping[str, object]) -> str:
    shown = (f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>" for key, value in facts.items())
    return f'<dl class="facts">{"".join(shown)}</dl>'


def _number(value: float | None, form: str = "{}") -> str:
    if value is None or not math.isfinite(value):
        return '<td class="number" data-value=""></td>'
    return f'<td class="number" data-value="{value!r}">{form.format(value)}</td>'


def _text(value: str) -> str:
    return f'<td data-value="{escape(value)}">{escape(value)}</td>'


def _config(point: str, reason: str) -> str:
    """Knobs, and below them why the trial failed."""
    failed = f'<div class="reason">{escape(reason)}</div>' if reason else ""
    return f'<td class="text" data-value="{escape(point)}">{escape(point)}{failed}</td>'


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _value(row: Row, metric: str) -> str:
    value = row.value(metric)
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
