"""The lanes that a search's trials can have: those of one lane can share a base."""

from collections.abc import Iterator
from typing import Any

from orchestrator.config.search import Search
from orchestrator.errors import ConfigError
from orchestrator.search.points import Dimension, dimensions, plain
from orchestrator.search.space import first_points, trial_run
from orchestrator.train.lane import lane_of, trains_alone

_MOST = 64
"""Values looked at of one whole-number range."""


def lanes(search: Search) -> dict[str, bool]:
    """All lanes of the space, and whether their trials train one by one: of each method's first point, and of what
    one other choice makes of it."""
    found: dict[str, bool] = {}
    for number, first in enumerate(first_points(search)):
        changes = [{}, *(change for d in dimensions(search, number) for change in _changes(d))]
        for change in changes:
            try:
                run = trial_run(search, first | change, "trial")
                found[lane_of(run)] = trains_alone(run)
            except ConfigError:
                continue  # such a trial ends with this reason
    return found


def _changes(dimension: Dimension) -> Iterator[dict[str, Any]]:
    span = dimension.range
    if span.form == "choice":
        yield from ({dimension.name: plain(value)} for value in span.values)
    elif not span.continuous:
        low, high = span.values
        yield from ({dimension.name: value} for value in range(low, min(high, low + _MOST) + 1))
