"""A sampler whose draws depend on a trial's number and on what is known by then, and on nothing else.

A search that goes on in another process then proposes what it would have proposed without the break.
"""

from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState


class Numbered(BaseSampler):  # type: ignore[misc]
    """Makes a sampler anew for each trial, from the trial's number."""

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self._make = make
        self._inner: BaseSampler = make(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """As optuna's."""
        self._inner = self._make(trial.number)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As optuna's."""
        found: dict[str, BaseDistribution] = self._inner.infer_relative_search_space(study, trial)
        return found

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As optuna's."""
        found: dict[str, Any] = self._inner.sample_relative(study, trial, search_space)
        return found

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As optuna's."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """As optuna's."""
        self._inner.after_trial(study, trial, state, values)
