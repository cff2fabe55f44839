"""A search's memory: ``$MANTA_HOME/searches/<id>/`` with ``search.json`` and ``study.jsonl``, read back into rows.

``study.jsonl`` is append-only, one JSON object a line: ``{"trial", "kind", "values", "at"}``, ``at`` in seconds since
1970. A line that a crash cut off is skipped. Kinds, and what ``values`` holds:

- ``queued``: ``number`` (from 0), ``params`` (the point, as the sampler proposed it), ``lane``, ``run`` (its config);
- ``tracked``: ``mlflow_run``, the trial's run in MLflow;
- ``joined``: ``step`` (where it starts or goes on), ``total`` steps, ``parameters`` (trained ones), ``memory`` (bytes
  that it adds in training), ``latency`` (seconds that it adds to a forward pass), ``pack`` (the one that took it);
  each where it is known;
- ``step``: ``step``, ``total``, ``loss``, ``lr``, ``grad_norm``, ``tokens`` (so far), ``seconds_per_step``;
- ``eval``: ``step``, ``total``, ``eval_loss`` and, of a classification, ``accuracy``, ``f1``, ``mcc``;
- ``saved``: ``step`` of a checkpoint;
- ``left``: it lost its slot and queues again, to go on from its checkpoint;
- ``ended``: ``why`` of ``finished``, ``stopped early``, ``withdrawn`` (the search stopped it) or ``failed``, and the
  ``reason`` of a failure.

A trial that went on from a checkpoint tells steps again; the last word on a step counts. Lines with an empty trial are
of the search itself: ``pack`` events, ``resumed``, ``over`` with the ``reason``.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.config import home
from orchestrator.config.search import Search
from orchestrator.config.train import HIGHER_IS_BETTER
from orchestrator.errors import CheckpointError

State = Literal["queued", "running", "finished", "stopped", "failed"]
_STATES: dict[str, State] = {
    "finished": "finished",
    "stopped early": "finished",
    "withdrawn": "stopped",
    "failed": "failed",
}
_MEASURED = ("eval_loss", "accuracy", "f1", "mcc")
_OF_THE_TRIAL = ("parameters", "memory", "latency")


@dataclass(frozen=True)
class Record:
    """``search.json``: what a search is and where its parts are."""

    id: str
    """Name of its folder, and of its experiment in the storage."""
    search: dict[str, Any]
    """Its config, resolved."""
    storage: str
    """Where packs keep checkpoints and Tune its state."""
    mlflow_run: str | None = None
    """The parent run."""


@dataclass
class Span:
    """A trial's stay in a slot."""

    begin: float
    end: float
    """The last word from it, both in seconds since 1970."""
    pack: str = ""


@dataclass
class Row:
    """One trial."""

    trial: str
    number: int
    params: dict[str, Any] = field(default_factory=dict)
    """The point: searched keys and their values."""
    run: dict[str, Any] = field(default_factory=dict)
    """Its config, a ``Run`` as JSON."""
    lane: str = ""
    state: State = "queued"
    why: str = ""
    """How it ended, a word of the ledger's."""
    reason: str = ""
    """Of a failure."""
    step: int = 0
    total: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """At its best evaluation by the first objective: the ones of the delta that would be published."""
    best_step: int = 0
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    """Of each metric, and of the training ``loss``: value by step."""
    parameters: int | None = None
    memory: float | None = None
    """Bytes that it adds in training."""
    latency: float | None = None
    """Seconds that it adds to a forward pass."""
    mlflow_run: str | None = None
    joined_at: float | None = None
    seconds: float = 0.0
    """In a slot, to the last word from it."""
    spans: list[Span] = field(default_factory=list)
    """Its stays in slots: several, where a pack was lost."""
    tokens: int = 0
    """Trained on, each step counted once."""

    @property
    def method(self) -> str:
        """Its method's type."""
        return str(self.run.get("method", {}).get("type", "lora"))

    def value(self, metric: str) -> float | None:
        """Its value for an objective; None where there is none yet, or where it is no number."""
        if metric in _OF_THE_TRIAL:
            found: float | None = getattr(self, metric)
        elif metric == "loss":
            curve = self.curves.get("loss", {})
            found = curve[max(curve)] if curve else None
        else:
            found = self.metrics.get(metric)
        return found if found is not None and math.isfinite(found) else None


class Study:
    """A search's rows, in the order in which trials were proposed. Hears events; ``load`` reads them from a folder."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.rows: dict[str, Row] = {}
        self.over: str | None = None
        """Why the search ended, once it has."""
        self.began_at: float | None = None
        self.last_at: float | None = None
        self.active_seconds = 0.0
        """While a driver was there."""

    @classmethod
    def load(cls, search_id: str) -> "Study":
        """The study of an id, as far as its ledger tells.

        Raises:
            CheckpointError: there is none.
        """
        study = cls(Search.model_validate(read_record(search_id).search))
        for line in read_lines(folder_of(search_id)):
            study.hear(line["trial"], line["kind"], line["values"], line["at"])
        return study

    @property
    def metrics(self) -> list[str]:
        """Names of the objectives, the first one first."""
        return [objective.metric for objective in self.search.objective]

    @property
    def tokens(self) -> int:
        """Of all trials together."""
        return sum(row.tokens for row in self.rows.values())

    def hear(self, trial: str, kind: str, values: Mapping[str, Any], at: float) -> None:
        """Take one event."""
        if self.began_at is None or self.last_at is None:
            self.began_at = self.last_at = at
        if (trial, kind) != ("", "resumed"):
            self.active_seconds += at - self.last_at
        self.last_at = at
        if not trial:
            if kind in ("over", "resumed"):
                self.over = values["reason"] if kind == "over" else None
            if kind == "resumed":
                for row in self.rows.values():
                    if row.state == "running":  # its pack went with the driver
                        self._left(row, {}, at)
            return
        row = self.rows.setdefault(trial, Row(trial, len(self.rows)))
        if row.joined_at is not None and row.state == "running":
            row.seconds += at - row.joined_at
            row.joined_at = row.spans[-1].end = at
        if take := getattr(self, f"_{kind}", None):
            take(row, values, at)

    def ranked(self) -> list[Row]:
        """Best first by the first objective; then those without a value, in order of proposal; failed ones last."""

        def key(row: Row) -> tuple[bool, bool, float, int]:
            value = row.value(self.metrics[0])
            return row.state == "failed", value is None, _cost(self.metrics[0], value or 0.0), row.number

        return sorted(self.rows.values(), key=key)

    def front(self) -> list[Row]:
        """Trials that no other one beats in every objective, best first; of one objective the winner alone."""
        judged = [r for r in self.ranked() if r.state != "failed" and None not in self._costs(r)]
        return [r for r in judged if not any(_beats(self._costs(o), self._costs(r)) for o in judged)]

    def winner(self) -> Row | None:
        """The best finished trial by the first objective; where none has finished, the best that was stopped."""
        metric = self.metrics[0]
        for state in ("finished", "stopped"):
            if rows := [r for r in self.ranked() if r.state == state and r.value(metric) is not None]:
                return rows[0]
        return None

    def after(self, row: Row, evaluations: int) -> dict[str, float] | None:
        """The objectives' values after so many evaluations, at the best of them; None where it has had fewer.

        ``tenth`` says how much of its own length the trial had done, so that long and short ones compare.
        """
        watched = self._watched()
        curve = row.curves.get(watched, {})
        steps = sorted(curve)[:evaluations]
        if not 0 < evaluations == len(steps):
            return None
        best = min(steps, key=lambda s: (_cost(watched, curve[s]), s))
        found = {m: row.curves[m][best] for m in (*_MEASURED, "loss") if best in row.curves.get(m, {})}
        found |= {m: v for m in _OF_THE_TRIAL if (v := row.value(m)) is not None}
        done = round(10 * steps[-1] / row.total) if row.total else evaluations
        return {"tenth": done, **{m: found[m] for m in self.metrics if m in found}}

    def worth(self, row: Row) -> dict[str, float]:
        """The objectives' values by now, those that are known; none of a trial that failed."""
        known = {} if row.state == "failed" else {metric: row.value(metric) for metric in self.metrics}
        return {metric: value for metric, value in known.items() if value is not None}

    def _watched(self) -> str:
        """The held-out metric that picks a trial's best delta: as ``trial_run`` says it to the training."""
        if "metric" in self.search.train.model_fields_set and self.search.train.metric in _MEASURED:
            return self.search.train.metric
        return next((metric for metric in self.metrics if metric in _MEASURED), "eval_loss")

    def _costs(self, row: Row) -> list[Any]:
        found = [(metric, row.value(metric)) for metric in self.metrics]
        return [None if value is None else _cost(metric, value) for metric, value in found]

    # -- one method a kind

    def _queued(self, row: Row, values: Mapping[str, Any], _: float) -> None:
        row.params, row.run, row.lane = dict(values["params"]), dict(values["run"]), values["lane"]
        row.number = values["number"]
        row.state, row.why, row.reason = "queued", "", ""

    def _tracked(self, row: Row, values: Mapping[str, Any], _: float) -> None:
        row.mlflow_run = values["mlflow_run"]

    def _joined(self, row: Row, values: Mapping[str, Any], at: float) -> None:
        row.state, row.joined_at = "running", at
        row.spans.append(Span(at, at, str(values.get("pack", ""))))
        row.step, row.total = values.get("step", row.step), values.get("total", row.total)
        for name in _OF_THE_TRIAL:
            if values.get(name) is not None:
                setattr(row, name, values[name])

    def _step(self, row: Row, values: Mapping[str, Any], _: float) -> None:
        step = values["step"]
        row.step, row.total = step, values.get("total", row.total)
        row.curves.setdefault("loss", {})[step] = values["loss"]
        row.tokens = values.get("tokens", row.tokens)

    def _eval(self, row: Row, values: Mapping[str, Any], _: float) -> None:
        step = values["step"]
        found = {name: values[name] for name in _MEASURED if name in values}
        for name, value in found.items():
            row.curves.setdefault(name, {})[step] = value
        for name in _OF_THE_TRIAL:
            if values.get(name) is not None:
                setattr(row, name, values[name])
        row.total = values.get("total", row.total)
        watched = self._watched()
        curve = row.curves.get(watched, {})
        if not curve:
            return
        row.best_step = min(curve, key=lambda s: (_cost(watched, curve[s]), s))
        row.metrics = {n: c[row.best_step] for n, c in row.curves.items() if n != "loss" and row.best_step in c}

    def _left(self, row: Row, values: Mapping[str, Any], _: float) -> None:
        row.state, row.joined_at = "queued", None

    def _ended(self, row: Row, values: Mapping[str, Any], _: float) -> None:
        row.why, row.reason = values["why"], values.get("reason") or ""
        row.state, row.joined_at = _STATES[row.why], None


def direction(metric: str) -> Literal["max", "min"]:
    """Which way a metric is good."""
    return "max" if metric in HIGHER_IS_BETTER else "min"


def _cost(metric: str, value: float) -> float:
    """Less is better; what is no number is worst."""
    if math.isnan(value):
        return math.inf
    return -value if direction(metric) == "max" else value


def _beats(one: list[float], other: list[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


# ---- files


def folder_of(search_id: str) -> Path:
    """A search's folder; it need not exist."""
    return home() / "searches" / search_id


def write_record(record: Record) -> None:
    """Remember what a search is."""
    folder = folder_of(record.id)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "search.json.part"
    part.touch(mode=0o600)  # a tracking URI may hold a password
    part.write_text(json.dumps(asdict(record), indent=2))
    part.replace(folder / "search.json")


def read_record(search_id: str) -> Record:
    """Recall it.

    Raises:
        CheckpointError: no search of that id was started here; names those that were.
    """
    path = folder_of(search_id) / "search.json"
    if path.parent.parent != home() / "searches" or not path.is_file():
        known = sorted((home() / "searches").glob("*/search.json"), key=lambda p: p.stat().st_mtime)
        latest = ", ".join(p.parent.name for p in known[-5:]) or "none"
        raise CheckpointError(f"no search {search_id!r} in {home() / 'searches'}; the latest are: {latest}")
    return Record(**json.loads(path.read_text()))


def append(folder: Path, events: Iterable[tuple[str, str, Mapping[str, Any]]]) -> float:
    """Add events to a study's ledger; returns the time that they were given.

    Raises:
        OSError: the disk is full, say; what was there before stays readable.
    """
    at = time.time()
    lines = [{"trial": t, "kind": k, "values": dict(v), "at": round(at, 3)} for t, k, v in events]
    if lines:
        with (folder / "study.jsonl").open("a+b", buffering=0) as file:
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            rest = b"\n" * torn + b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            while rest:  # a disk that fills up takes a part, and says so only when asked for more
                rest = rest[file.write(rest) :]
            if any(line["kind"] == "ended" for line in lines):
                os.fsync(file.fileno())  # what has ended stays ended, also where the machine goes down
    return at


def read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """A ledger's lines; one that was cut off is left out."""
    path = folder / "study.jsonl"
    if not path.is_file():
        return
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict) and line.keys() >= {"trial", "kind", "values", "at"}:
                yield line
