"""The pictures of a search's report, each a plotly figure or None where there is nothing to show."""

from collections.abc import Sequence
from html import escape
from typing import Any

import optuna
import plotly.graph_objects as go
from plotly.colors import qualitative

from orchestrator.search.frozen import frozen_study, importances, judged, knobs, label
from orchestrator.search.study import Row, Study, direction

COLORS = qualitative.D3
STATES = {"finished": "#2ca02c", "stopped": "#ff9f1c", "failed": "#d62728", "running": "#1f77b4", "queued": "#999999"}
UNITS = {"memory": "bytes", "latency": "s", "parameters": "trained parameters", "loss": "training loss"}


def said(value: Any) -> str:
    """A knob's value for a person."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _hover(row: Row) -> str:
    """Number, state and knobs, safe in plotly's texts, which know tags."""
    lines = [f"<b>trial {row.number}</b> {escape(label(row))}, {escape(row.state)}"]
    lines += [f"{escape(key)} = {escape(said(value))}" for key, value in knobs(row).items()]
    return "<br>".join(lines)


def _colors(study: Study) -> dict[str, str]:
    methods = sorted({label(row) for row in study.rows.values()})
    return {method: COLORS[n % len(COLORS)] for n, method in enumerate(methods)}


def _figure(traces: Sequence[Any], height: int = 420, **layout: Any) -> Any:
    figure = go.Figure(traces)
    figure.update_layout(template="plotly_white", height=height, margin={"l": 70, "r": 20, "t": 30, "b": 60}, **layout)
    return figure


def learning_curves(study: Study) -> Any:
    """Each trial's values over its steps, a menu for the metric; a colour a method."""
    first = study.metrics[0]
    names = {name for row in study.rows.values() for name in row.curves}
    metrics = sorted(names, key=lambda name: (name != first, name == "loss", name))
    colors = _colors(study)
    traces, shown = [], []
    for metric in metrics:
        legend: set[str] = set()
        for row in sorted(study.rows.values(), key=lambda row: (label(row), row.state != "finished", row.number)):
            if curve := row.curves.get(metric):
                traces.append(_curve(row, metric, curve, colors[label(row)], first_of=label(row) not in legend))
                legend.add(label(row))
                shown.append(metric)
    if not traces:
        return None
    for trace, metric in zip(traces, shown, strict=True):
        trace.visible = metric == metrics[0]
    buttons = [
        {
            "label": escape(metric),
            "method": "update",
            "args": [{"visible": [m == metric for m in shown]}, {"yaxis.title.text": escape(metric)}],
        }
        for metric in metrics
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.12, "yanchor": "bottom", "type": "dropdown"}
    figure = _figure(traces, height=480, xaxis_title="step", yaxis_title=metrics[0], hovermode="closest")
    figure.update_layout(updatemenus=[menu] if len(buttons) > 1 else [], margin_t=70)
    return figure


def _curve(row: Row, metric: str, curve: dict[int, float], color: str, *, first_of: bool) -> Any:
    steps = sorted(curve)
    return go.Scatter(
        x=steps,
        y=[curve[step] for step in steps],
        mode="lines" if metric == "loss" else "lines+markers",
        line={"color": color, "width": 1.5, "dash": "dot" if row.state == "failed" else "solid"},
        marker={"size": 5},
        opacity=0.9 if row.state == "finished" else 0.5,
        name=escape(label(row)),
        legendgroup=label(row),
        showlegend=first_of,
        hovertemplate=f"step %{{x}}: {escape(metric)} %{{y:.5g}}<br>{_hover(row).replace('%', '%%')}<extra></extra>",
    )


def parallel_coordinates(study: Study) -> Any:
    """Every judged trial a line through its knobs, Optuna's plot."""
    made = frozen_study(study)
    if len(made.trials) < 2 or not any(trial.params for trial in made.trials):
        return None
    metric = study.metrics[0]
    figure = optuna.visualization.plot_parallel_coordinate(made, target=lambda trial: trial.value, target_name=metric)
    figure.update_layout(title=None, height=440, margin={"l": 60, "r": 20, "t": 30, "b": 70})
    figure.update_annotations(bgcolor="rgba(255, 255, 255, 0.8)")
    figure.update_traces(opacity=0.9, line_width=1.8, selector={"mode": "lines"})
    labels = [escape(name) for name in figure.layout.xaxis.ticktext]
    figure.update_xaxes(ticktext=labels, tickangle=25)
    return figure


def importance(study: Study) -> Any:
    """A bar a knob; None where the trials are too few."""
    found = importances(frozen_study(study))
    if not found:
        return None
    names = [escape(name) for name in reversed(found)]
    shares = list(reversed(found.values()))
    bar = go.Bar(
        x=shares,
        y=names,
        orientation="h",
        marker_color=COLORS[0],
        text=[f"{share:.2f}" for share in shares],
        textposition="outside",
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        cliponaxis=False,
    )
    figure = _figure([bar], height=110 + 30 * len(names), xaxis_title="share of the importance")
    figure.update_layout(margin={"l": 150, "r": 50})
    return figure


def pareto(study: Study) -> dict[str, Any]:
    """Quality against each further objective, or against trained parameters; the front is what none beats in both."""
    first, *others = study.metrics
    made = {}
    for other in others or (["parameters"] if first != "parameters" else []):
        rows = [row for row in judged(study) if row.value(other) is not None]
        if rows:
            made[other] = _tradeoff(study, rows, other)
    return made


def _tradeoff(study: Study, rows: list[Row], other: str) -> Any:
    first, colors = study.metrics[0], _colors(study)
    traces = []
    for method in sorted({label(row) for row in rows}):
        own = [row for row in rows if label(row) == method]
        traces.append(
            go.Scatter(
                x=[row.value(other) for row in own],
                y=[row.value(first) for row in own],
                mode="markers",
                marker={"size": 10, "color": colors[method], "line": {"width": 1, "color": "white"}},
                name=escape(method),
                text=[_hover(row) for row in own],
                hovertemplate=f"{escape(first)} %{{y:.5g}}, {escape(other)} %{{x:.5g}}<br>%{{text}}<extra></extra>",
            )
        )
    best = front(rows, first, other)
    traces.append(
        go.Scatter(
            x=[row.value(other) for row in best],
            y=[row.value(first) for row in best],
            mode="lines+markers",
            line={"color": "#444", "width": 1, "dash": "dash", "shape": "hv"},
            marker={"symbol": "circle-open", "size": 15, "color": "#444"},
            name="front",
            hoverinfo="skip",
        )
    )
    values = [row.value(other) or 0.0 for row in rows]
    log = min(values) > 0 and max(values) / min(values) > 10
    axis = (
        {"title": UNITS.get(other, other), "type": "log", "dtick": "D2"} if log else {"title": UNITS.get(other, other)}
    )
    return _figure(traces, xaxis=axis, yaxis_title=first)


def front(rows: Sequence[Row], first: str, other: str) -> list[Row]:
    """Of rows that have both values those that no other one beats in both, from the least of ``other`` on."""

    def cost(row: Row, metric: str) -> float:
        return (row.value(metric) or 0.0) * (-1 if direction(metric) == "max" else 1)

    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (cost(row, other), cost(row, first), row.number)):
        if not best or cost(row, first) < cost(best[-1], first):
            best.append(row)
    return best


def timeline(study: Study) -> Any:
    """When each trial was in a slot: a line a slot, a bar a stay."""
    stays = sorted(
        ((span, row) for row in study.rows.values() for span in row.spans), key=lambda s: (s[0].begin, s[1].number)
    )
    if not stays or study.began_at is None:
        return None
    free: dict[str, list[float]] = {}
    bars: dict[str, list[tuple[str, float, float, Row]]] = {}
    for span, row in stays:
        pack = span.pack or row.lane or "pack"
        ends = free.setdefault(pack, [])
        slot = next((n for n, end in enumerate(ends) if end <= span.begin), len(ends))
        ends[slot : slot + 1] = [span.end]
        line = f"{escape(pack)} · {slot + 1:02d}"
        bars.setdefault(row.state, []).append((line, span.begin - study.began_at, span.end - span.begin, row))
    traces = [
        go.Bar(
            y=[line for line, *_ in bars[state]],
            base=[begin for _, begin, *_ in bars[state]],
            x=[max(seconds, 1e-3) for _, _, seconds, _ in bars[state]],
            orientation="h",
            name=state,
            marker={"color": STATES[state], "line": {"color": "white", "width": 1}},
            text=[str(row.number) for *_, row in bars[state]],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            customdata=[_hover(row) for *_, row in bars[state]],
            hovertemplate="%{customdata}<br>%{x:.1f} s from %{base:.1f} s<extra></extra>",
        )
        for state in STATES
        if state in bars
    ]
    lines = sorted({line for own in bars.values() for line, *_ in own}, reverse=True)
    figure = _figure(traces, height=130 + 26 * len(lines), barmode="overlay", xaxis_title="seconds since the start")
    figure.update_layout(yaxis={"categoryorder": "array", "categoryarray": lines}, margin={"l": 120})
    figure.update_xaxes(rangemode="tozero")
    return figure
