"""Rules of a search: that every trial it may draw is a good run, and that its trials can be told apart and compared."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator.config import checks
from orchestrator.config.checks import Problem
from orchestrator.config.document import dotted, split
from orchestrator.config.explain import Finding, explain, nearest, shown
from orchestrator.config.method import KINDS, default_of
from orchestrator.config.ranges import FORMS, Range, Way, flat, is_range, put, read, wrong
from orchestrator.config.run import Run
from orchestrator.config.search import HELD_OUT, Search
from orchestrator.config.train import HIGHER_IS_BETTER

_HOLD_OUT = "give data.eval (held-out records) or data.eval_fraction (such as 0.05)"
_ONE_BASE = "the trials of a search share one base and its workers"
_COMPARED = "trials are compared on the same held-out records by the same metric"
_NO_RESULT = "it changes nothing that is learnt; set it for all trials, outside space"
_REFUSED: dict[str, str] = {
    "base": f"{_ONE_BASE}; search each base by itself",
    "cluster": f"{_ONE_BASE}; set it for all trials",
    "shard": f"{_ONE_BASE}; set it for all trials",
    "tracking": "the trials of a search are one study; set it for all trials",
    "name": "trials are named after the search and numbered",
    "method": "a method's knobs are searched in its entry of methods",
    "methods": "a method's knobs are searched in its entry of methods",
    "task": "the trials of a search learn one task; set it for all trials",
    "data.eval": _COMPARED,
    "data.eval_fraction": _COMPARED,
    "data.workers": _NO_RESULT,
    "train.metric": _COMPARED,
    "train.rows_per_pass": _NO_RESULT,
    "train.recompute": _NO_RESULT,
    "train.checkpoint_every": _NO_RESULT,
    "train.keep": _NO_RESULT,
    "train.log_every": _NO_RESULT,
    "train.init_from": "a delta to begin with has one method and one rank, and fits no trial of another",
}
"""Keys, or whole sections, that ``space`` may not hold, and why."""


def problems(search: Search) -> list[Problem]:
    """What is wrong with a search although each value by itself is allowed."""
    common = checks.problems(Run.model_validate(search.common()))
    known = {message for _, message in common}
    return [
        *common,
        *_budget(search),
        *_objective(search),
        *_start(search),
        *_methods(search, known),
        *_space(search, known),
        *_grid(search),
    ]


def _budget(search: Search) -> Iterator[Problem]:
    budget = search.budget
    yield from checks.finite(budget, "budget")
    if (budget.trials, budget.tokens, budget.hours) == (None, None, None) and search.sampler.type != "grid":
        yield "budget", "trials, tokens and hours are all null, so the search would never end; give one of them"


def _objective(search: Search) -> Iterator[Problem]:
    metrics = [o.metric for o in search.objective]
    held_out = search.data.eval or search.data.eval_fraction
    for i, metric in enumerate(metrics):
        where = f"objective.{i}.metric"
        if metric in metrics[:i]:
            yield where, f"{metric} is already objective.{metrics.index(metric)}; leave out one of the two"
        elif metric in HIGHER_IS_BETTER and search.task.type != "classification":
            yield where, f"{metric} is of a classification; take eval_loss, or task: classification"
        elif metric in HELD_OUT and not held_out:
            yield where, f"{metric} needs held-out records: {_HOLD_OUT}"
    if search.scheduler.type != "none" and not HELD_OUT & set(metrics):
        yield (
            "scheduler.type",
            f"{search.scheduler.type} compares trials on a held-out metric, and objective has none: "
            f"add {' or '.join(sorted(HELD_OUT))}, or take scheduler: none",
        )


def _start(search: Search) -> Iterator[Problem]:
    if search.train.init_from is not None:
        yield "train.init_from", f"{_REFUSED['train.init_from']}; leave it out of a search"


def _methods(search: Search, known: set[str]) -> Iterator[Problem]:
    for i, entry in enumerate(search.methods):
        where = f"methods.{i}"
        if (same := search.methods.index(entry)) != i:
            yield where, f"the same as methods.{same}, and nothing tells the two apart; leave out one"
        elif (said := entry.get("type")) not in KINDS:
            guess = nearest(said, KINDS)
            hint = f"; nearest: {guess}" if guess else ""
            yield f"{where}.type", f"got {shown(said)}; allowed: one of {', '.join(KINDS)}{hint}"
        else:
            yield from _knobs(search, where, entry, known)
            yield from _own_lr(search, where, entry)


def _knobs(search: Search, where: str, entry: Mapping[str, Any], known: set[str]) -> Iterator[Problem]:
    """Each value by itself, the others at the point that is tried first. What only two searched knobs together cannot
    be, a trial finds out."""
    kind = KINDS[str(entry["type"])]
    values = {**search.common(), "method": {}}
    ranges: dict[Way, Range] = {}
    for way, value in flat({k: v for k, v in entry.items() if k != "train"}):
        if not is_range(value):
            put(values, ("method", *way), value)
        elif (mistake := wrong(value) or _slash(way)) is not None:
            yield f"{where}.{'.'.join(way)}", mistake
        else:
            ranges[("method", *way)] = read(value)
            put(values, ("method", *way), read(value).nearest(default_of(kind, way)))
    reported = False
    for finding in _judged(values, known):
        if finding.key not in ranges:
            reported = True
            yield _moved(finding, where)
    for way, span in ranges.items() if not reported else ():
        for message in _probed(values, way, span, known):
            yield f"{where}.{'.'.join(way[1:])}", message


def _own_lr(search: Search, where: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    """``train.lr`` beside the knobs: a method's own learning rate."""
    if "train" not in entry:
        return
    own = entry["train"]
    if not isinstance(own, Mapping) or set(own) != {"lr"}:
        yield f"{where}.train", "of train a method has a value of its own for lr alone; all else goes to train or space"
        return
    at, way = f"{where}.train.lr", ("train", "lr")
    if search.train.lr is not None or "lr" in search.space.get("train", {}):
        there = "train.lr" if search.train.lr is not None else "space"
        yield at, f"{there} gives train.lr to all methods; keep one of the two"
    elif is_range(own["lr"]) and (mistake := wrong(own["lr"])) is not None:
        yield at, mistake
    else:
        span = read(own["lr"]) if is_range(own["lr"]) else Range("choice", (own["lr"],))
        for message in _probed(search.common(), way, span, set()):
            yield at, message


def _space(search: Search, known: set[str]) -> Iterator[Problem]:
    values = search.common()
    found = list(flat(search.space))
    times = Counter(".".join(way) for way, _ in found)
    for written, value in found:
        name = ".".join(written)
        where, way = f"space.{name}", tuple(name.split("."))
        if (reason := _refused(search, way)) is not None:
            yield where, f"cannot be searched: {reason}"
        elif times[name] > 1:
            if written == way:
                yield where, "given twice, once as a dotted key; keep one"
        elif not is_range(value):
            yield where, _no_range(name, value)
        elif (mistake := wrong(value) or _slash(way)) is not None:
            yield where, mistake
        elif len(way) == 2 and way[1] in getattr(getattr(search, way[0], None), "model_fields_set", ()):
            yield where, f"{name} has a value too, which fixes it for all trials; keep one of the two"
        else:
            for message in _probed(values, way, read(value), known):
                yield where, message


def _refused(search: Search, way: Way) -> str | None:
    """Why a key cannot be searched; None if it can."""
    for n in range(1, len(way) + 1):
        if (reason := _REFUSED.get(".".join(way[:n]))) is not None:
            return reason
    if search.data.eval_fraction and (way == ("train", "seed") or way[:2] == ("data", "train")):
        return "with data.eval_fraction each trial would hold out other records; name them in data.eval"
    return None


def _no_range(name: str, value: object) -> str:
    last = name.rpartition(".")[2]
    if isinstance(value, list | tuple) and (guess := nearest(last, FORMS)) is not None:
        return f"{last} is no form of a range; allowed: {', '.join(FORMS)}; nearest: {guess}"
    if isinstance(value, list | tuple):
        return f"got {shown(value)}; a list to choose from is {{choice: {shown(value)}}}"
    forms = ", ".join(f"{{{form}: [...]}}" for form in FORMS)
    return f"got {shown(value)}; allowed: a range, {forms}. What all trials share stands outside space: {name}"


def _probed(values: dict[str, Any], way: Way, span: Range, known: set[str]) -> Iterator[str]:
    """What is wrong with the members or ends of a range as values of the key at ``way``."""
    for label, value in span.probes():
        tried = copy.deepcopy(values)
        try:
            put(tried, way, value)
        except LookupError as error:
            yield str(error.args[0])
            return
        findings = _judged(tried, known)
        if any(f.unknown for f in findings):
            yield from (f.message for f in findings if f.unknown)
            return
        if findings and label == "between the ends":
            whole = "log_int" if span.form == "log" else "int"
            yield f"takes no fractions, and {span.form} draws them; write {{{whole}: {shown(list(span.values))}}}"
        elif findings:
            yield from dict.fromkeys(f"{label}: {f.message}" for f in findings)
        if findings and span.form != "choice":
            return


def _judged(values: dict[str, Any], known: set[str]) -> list[Finding]:
    """What is wrong with the run that plain values make, apart from what is known already."""
    try:
        run = Run.model_validate(values)
    except ValidationError as error:
        return explain(Run, error)
    return [Finding(split(where), m, unknown=False) for where, m in checks.problems(run) if m not in known]


def _moved(finding: Finding, where: str) -> Problem:
    """A finding on a run's method, said of an entry of ``methods``."""
    if finding.key[:1] == ("method",):
        return dotted((*split(where), *finding.key[1:])), finding.message
    return where, f"{dotted(finding.key)}: {finding.message}"


def _slash(way: Way) -> str | None:
    return "the key of a range holds no /; fix its value" if "/" in "".join(way) else None


def _grid(search: Search) -> Iterator[Problem]:
    if search.sampler.type != "grid":
        return
    sections = [(f"methods.{i}", entry) for i, entry in enumerate(search.methods)] + [("space", search.space)]
    for where, section in sections:
        for way, value in flat(section):
            if is_range(value) and wrong(value) is None and read(value).continuous:
                name = ".".join((where, *way))
                yield name, "sampler: grid needs finite ranges; list the values with choice, or take sampler: tpe"
