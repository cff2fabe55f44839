"""The space of a search's trials: what is drawn, point by point, and the run that a point stands for.

The space is conditional: ``method`` is drawn first, then that method's own knobs (``lora.rank``) and learning rate
(``lora.train.lr``), then what all methods share (``train.batch_size``). A point is flat: name -> plain value.
"""

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from orchestrator.config import Run, Search
from orchestrator.config.checks import problems
from orchestrator.config.document import dotted
from orchestrator.config.explain import explain
from orchestrator.config.method import KINDS, default_of
from orchestrator.config.ranges import Range, Way, flat, is_range, put, read
from orchestrator.config.train import Train
from orchestrator.errors import ConfigError
from orchestrator.search.priors import BATCH_SIZES, alpha_of, knob_priors, lr_prior

METHOD = "method"
"""Name of the first dimension, which the others depend on."""
_LR: Way = ("train", "lr")
_BATCH: Way = ("train", "batch_size")


class Trial(Protocol):
    """What ``suggest`` needs of an ``optuna.Trial``."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of ``choices``."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> Any:
        """A number."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> Any:
        """A whole number."""


@dataclass(frozen=True)
class Dimension:
    """One thing that is drawn: its name in a point, its key in a run, its range, and the value tried first."""

    name: str
    way: Way
    range: Range
    first: Any

    def suggest(self, trial: Trial) -> None:
        """Draw it."""
        form, values = self.range.form, self.range.values
        if form == "choice":
            trial.suggest_categorical(self.name, [plain(v) for v in values])
        elif self.range.continuous:
            trial.suggest_float(self.name, *values, log=form == "log")
        else:
            trial.suggest_int(self.name, *values, log=form == "log_int")

    def value(self, drawn: Any) -> Any:
        """The run's value for what was drawn.

        Raises:
            ConfigError: it is no point of the range.
        """
        if self.range.form != "choice":
            return drawn
        for value in self.range.values:
            if plain(value) == drawn:
                return copy.deepcopy(value)
        raise ConfigError(f"{self.name}: {drawn!r} is none of {', '.join(map(str, map(plain, self.range.values)))}")


def plain(value: Any) -> Any:
    """A member of a choice as a point holds it: lists and mappings as JSON text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def labels(search: Search) -> tuple[str, ...]:
    """A name for each entry of ``methods``: its method, from the second of a kind on with a number (``lora#2``)."""
    seen: Counter[str] = Counter()
    out = []
    for entry in search.methods:
        seen[kind := entry["type"]] += 1
        out.append(kind if seen[kind] == 1 else f"{kind}#{seen[kind]}")
    return tuple(out)


def dimensions(search: Search, number: int) -> list[Dimension]:
    """What is drawn after entry ``number`` of ``methods``: its knobs, the learning rate, the keys of ``space``."""
    entry, label = search.methods[number], labels(search)[number]
    kind = KINDS[entry["type"]]
    finite = search.sampler.type == "grid"
    own = {("method", *way) if way[0] != "train" else way: value for way, value in flat(entry) if way != ("type",)}
    knobs = {way: read(value) for way, value in own.items() if is_range(value)}
    for knob, prior in knob_priors(entry["type"], _longest_row(search), finite).items():
        if knob not in entry:
            knobs[("method", knob)] = prior
    shared = {way: read(value) for way, value in flat(search.space)}
    if _LR not in own and _LR not in shared and search.train.lr is None:
        knobs[_LR] = lr_prior(kind.default_lr, finite)
    # Where steps are given, a smaller batch would mean less data, and trials would not be on equal terms.
    if not {"batch_size", "steps"} & search.train.model_fields_set and not {_BATCH, ("train", "steps")} & set(shared):
        shared[_BATCH] = Range("choice", BATCH_SIZES)
    out = []
    for way, span in sorted(knobs.items(), key=lambda item: item[0] == _LR):
        default = kind.default_lr if way == _LR else default_of(kind, way[1:])
        out.append(Dimension(f"{label}.{'.'.join(way[1:] if way != _LR else way)}", way, span, span.nearest(default)))
    for way, span in shared.items():
        default = kind.default_lr if way == _LR else _common(search, way)
        out.append(Dimension(".".join(way), way, span, span.nearest(default)))
    return out


def suggest(search: Search, trial: Trial) -> None:
    """Draw one point: a define-by-run space (``functools.partial(suggest, search)``)."""
    names = labels(search)
    label = trial.suggest_categorical(METHOD, list(names))
    for dimension in dimensions(search, names.index(label)):
        dimension.suggest(trial)


def first_points(search: Search) -> list[dict[str, Any]]:
    """The point of each method that is closest to its defaults; tried first, a search is never worse than these."""
    return [
        {METHOD: label, **{d.name: plain(d.first) for d in dimensions(search, i)}}
        for i, label in enumerate(labels(search))
    ]


def size(search: Search) -> int | None:
    """Number of points; None where a range is continuous."""
    total = 0
    for i in range(len(search.methods)):
        sizes = [d.range.size for d in dimensions(search, i)]
        if None in sizes:
            return None
        total += math.prod(s for s in sizes if s is not None)
    return total


def trial_run(search: Search, params: Mapping[str, Any], trial_id: str) -> Run:
    """The run that a point stands for, named ``trial_id`` (such as ``search-0007``).

    Base, data, task, cluster and tracking are the search's. Where ``train.metric`` is silent, the first objective that
    training measures picks a trial's best delta.

    Raises:
        ConfigError: the point is not of this space, or two of its values exclude each other; every reason is named.
    """
    names = labels(search)
    if (label := params.get(METHOD)) not in names:
        raise ConfigError(f"{trial_id}: method {label!r} is none of {', '.join(names)}")
    number = names.index(str(label))
    drawn = {d.name: d for d in dimensions(search, number)}
    if (given := set(params) - {METHOD}) != set(drawn):
        odd = ", ".join(sorted(given ^ set(drawn)))
        raise ConfigError(f"{trial_id}: a point of {label} holds {', '.join(drawn)}; unknown or missing: {odd}")
    values: dict[str, Any] = {**search.common(), "name": trial_id, "method": {}}
    measured = [o.metric for o in search.objective if o.metric in _KEEPS]
    if measured and "metric" not in search.train.model_fields_set:
        put(values, ("train", "metric"), measured[0])
    for way, value in flat(search.methods[number]):
        if not is_range(value):
            put(values, way if way[0] == "train" else ("method", *way), copy.deepcopy(value))
    for name, dimension in drawn.items():
        put(values, dimension.way, dimension.value(params[name]))
    method = values["method"]
    if method["type"] == "lora" and "alpha" not in method:
        rank = method.get("rank", default_of(KINDS["lora"], ("rank",)))
        method["alpha"] = alpha_of(rank, bool(method.get("rslora")))
    return _checked(values, trial_id)


_KEEPS = frozenset(Train.model_fields["metric"].annotation.__args__)  # type: ignore[union-attr]
"""Metrics that can pick a trial's best delta."""


def _checked(values: dict[str, Any], trial_id: str) -> Run:
    try:
        run = Run.model_validate(values)
    except ValidationError as error:
        said = [f"{dotted(f.key)}: {f.message}" for f in explain(Run, error)]
    else:
        said = [f"{where}: {message}" for where, message in problems(run)]
        if not said:
            return run
    raise ConfigError(f"{trial_id} is no run: {'; '.join(said)}")


def _common(search: Search, way: Way) -> Any:
    """What the run's default, or the search, says at ``way``."""
    here: Any = search.common()
    for step in way:
        here = here[int(step)] if isinstance(here, list | tuple) else here[step]
    return here


def _longest_row(search: Search) -> int:
    """Tokens of the shortest row that a trial may have."""
    length = search.space.get("data", {}).get("length")
    return min(read(length).values) if length is not None else search.data.length
