"""The dimensions of a search's space: what is drawn after a method, where it goes in a run, and what is tried first."""

import copy
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.config import Search
from orchestrator.config.method import KINDS, default_of
from orchestrator.config.ranges import Range, Way, flat, is_range, read
from orchestrator.errors import ConfigError
from orchestrator.search.priors import BATCH_SIZES, knob_priors, lr_prior

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
    for knob, prior in knob_priors(entry["type"], _shortest_row(search), finite).items():
        if knob not in entry:
            knobs[("method", knob)] = prior
    shared = {way: read(value) for way, value in flat(search.space)}
    if _LR not in own and _LR not in shared and search.train.lr is None:
        knobs[_LR] = lr_prior(entry["type"], finite)
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


def _common(search: Search, way: Way) -> Any:
    """What the search says at ``way``."""
    here: Any = search
    for step in way:
        here = (
            here[int(step)]
            if isinstance(here, tuple)
            else here[step]
            if isinstance(here, dict)
            else getattr(here, step)
        )
    return here


def _shortest_row(search: Search) -> int:
    """Tokens of the shortest row that a trial may have."""
    length = search.space.get("data", {}).get("length")
    return min(read(length).values) if length is not None else search.data.length
