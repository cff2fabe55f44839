"""What proposes trials: a space with numbers, a sampler that does not mind a break, and the points that come first."""

from collections.abc import Iterable
from typing import Any

import optuna

from orchestrator.config.search import Search
from orchestrator.search.numbered import Numbered
from orchestrator.search.space import first_points, sampler, suggest
from orchestrator.search.study import Row

NUMBER = "number"
"""Key of a trial's number beside its point."""
_PRIME = 1_000_003


def propose(search: Search, trial: optuna.Trial) -> dict[str, int]:
    """Draw a point; what is returned comes beside it."""
    suggest(search, trial)
    return {NUMBER: trial.number}


def numbered_sampler(search: Search) -> Numbered:
    """The search's sampler, whose draws depend on a trial's number and on what is known by then."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the study tells of trials
    return Numbered(_Seeded(search))


class _Seeded:
    """Makes the sampler of one trial."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def __call__(self, number: int) -> Any:
        seed = (self._search.seed * _PRIME + number) % 2**32
        return sampler(self._search.model_copy(update={"seed": seed}))


def points(search: Search, known: Iterable[Row]) -> list[dict[str, Any]]:
    """Points by trial number: those of an earlier driver, then the space's own first ones.

    A number that the earlier driver drew and did not get to offer is drawn anew: an empty point fixes nothing.
    """
    found = {row.number: row.params for row in known if row.params}
    first = dict(enumerate(first_points(search)))
    count = max([*found, *first], default=-1) + 1
    return [found.get(n, first.get(n, {})) for n in range(count)]
