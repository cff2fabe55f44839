"""What proposes the next point, which way is better, and which trials can share a base."""

import warnings
from typing import Literal

import optuna
from optuna.samplers import BaseSampler, BruteForceSampler, RandomSampler, TPESampler

from orchestrator.config import Run, Search
from orchestrator.config.train import HIGHER_IS_BETTER

Mode = Literal["min", "max"]


class Grid(BruteForceSampler):  # type: ignore[misc]
    """Every point of a finite space once, in drawn order; ``size`` of the space says when to stop asking."""

    def after_trial(self, *_: object) -> None:
        """Nothing: the parent would stop optuna's own loop, and whoever asks and tells by hand has none."""


def sampler(search: Search) -> BaseSampler:
    """The sampler of a search, seeded.

    The estimator is multivariate, each group of knobs that occur together by itself (Falkner et al. 2018,
    arXiv:1807.01774): the knobs of one method never mix with another's. Running trials count as bad ones, so that many
    that start at once differ.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler.type == "random":
            return RandomSampler(seed=search.seed)
        if search.sampler.type == "grid":
            return Grid(seed=search.seed)
        startup = search.sampler.startup
        return TPESampler(seed=search.seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


def modes(search: Search) -> dict[str, Mode]:
    """Metric of each objective, in order, and whether less or more of it is better."""
    return {o.metric: "max" if o.metric in HIGHER_IS_BETTER else "min" for o in search.objective}


def lane(run: Run) -> str:
    """Runs of one lane can share a base; those of ``solo`` share theirs with none.

    ``packed``: any mix of methods that add to a frozen base. ``unquantized-<k>``: the last k layers are held
    unquantized for it, which would change what other methods see; on a dense base these mix too.
    """
    method = run.method
    if method.type in ("full", "peft"):
        return "solo"
    if method.type == "last_layers" and run.base.quantize != "none":
        return f"unquantized-{method.layers}"
    return "packed"
