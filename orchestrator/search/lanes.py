"""The lanes that a search's trials can have: those of one lane can share a base."""

from collections.abc import Iterator
from typing import Any

from orchestrator.config.search import Search
from orchestrator.errors import ConfigError
from orchestrator.search.sampler import lane
from orchestrator.search.space import Dimension, dimensions, first_points, plain, trial_run

SOLO = "solo"
"""The lane whose trials train one by one."""
_MOST = 64
"""Values looked at of one whole-number range."""


def lanes(search: Search) -> list[str]:
    """All lanes of the space: of each method's first point, and of what one other choice makes of it."""
    found: dict[str, None] = {}
    for number, first in enumerate(first_points(search)):
        changes = [{}, *(change for d in dimensions(search, number) for change in _changes(d))]
        for change in changes:
            try:
                found[lane(trial_run(search, first | change, "trial"))] = None
            except ConfigError:
                continue  # such a trial ends with this reason
    return list(found)


def _changes(dimension: Dimension) -> Iterator[dict[str, Any]]:
    span = dimension.range
    if span.form == "choice":
        yield from ({dimension.name: plain(value)} for value in span.values)
    elif not span.continuous:
        low, high = span.values
        yield from ({dimension.name: value} for value in range(low, min(high, low + _MOST) + 1))
