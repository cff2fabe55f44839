"""The space of a search's trials: what is drawn, point by point, and the run that a point stands for.

The space is conditional: ``method`` is drawn first, then that method's own knobs (``lora.rank``) and learning rate
(``lora.train.lr``), then what all methods share (``train.batch_size``). A point is flat: name -> plain value.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import optuna
from optuna.samplers import BaseSampler, BruteForceSampler, RandomSampler, TPESampler

from orchestrator.config import Run, Search
from orchestrator.config.load import make_run
from orchestrator.config.method import KINDS, default_of
from orchestrator.config.ranges import flat, is_range, put
from orchestrator.config.train import HIGHER_IS_BETTER, Train
from orchestrator.errors import ConfigError
from orchestrator.search.points import Trial, dimensions, labels, plain
from orchestrator.search.priors import alpha_of

METHOD = "method"
"""Name of the first dimension, which the others depend on."""
_KEEPS = frozenset(get_args(Train.model_fields["metric"].annotation))
"""Metrics that can pick a trial's best delta."""
Mode = Literal["min", "max"]


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
    return make_run(values, trial_id)


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
