"""A study as Optuna's own, made of frozen trials, for its importances and plots. Nothing is read or written."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestrator.search.study import Row, Study, direction

FEWEST = 12
"""Judged trials below which importances are noise."""
BEST_SHARE = 0.25
"""A knob is important if it tells the best quarter from the rest."""
_LOG_FROM = 30.0
"""Values that span as much are spread evenly by their logarithm."""


def judged(study: Study) -> list[Row]:
    """Trials with a value for the first objective, in order of proposal; a failed one says little of its knobs."""
    rows = [row for row in study.rows.values() if row.state != "failed" and row.value(study.metrics[0]) is not None]
    return sorted(rows, key=lambda row: row.number)


def plain(value: Any) -> Any:
    """A knob's value as a number or a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return value


def label(row: Row) -> str:
    """Its entry among the search's methods: its method, with a number where several entries have the same."""
    return str(row.params.get("method") or row.method)


def knobs(row: Row) -> dict[str, Any]:
    """What was drawn for a trial, named as in its run and short: ``lora.train.lr`` and ``train.lr`` are ``lr``.

    Knobs of two methods that share a name share it here, too, so that they can be compared.
    """
    own = f"{label(row)}."
    names = {key: key.removeprefix(own).removeprefix("method.").removeprefix("train.") for key in row.params}
    return {name: plain(row.params[key]) for key, name in names.items()}


def frozen_study(study: Study) -> "optuna.Study":
    """The judged trials, with the first objective as value; knobs that have one value only are left out."""
    rows = judged(study)
    points = [knobs(row) for row in rows]
    spread = _distributions(points)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    way = {"max": "maximize", "min": "minimize"}[direction(study.metrics[0])]
    made = optuna.create_study(direction=way)
    for row, point in zip(rows, points, strict=True):
        kept = {key: _as(spread[key], value) for key, value in point.items() if key in spread}
        made.add_trial(_frozen(kept, spread, row.value(study.metrics[0])))
    return made


def importances(made: "optuna.Study") -> dict[str, float]:
    """Share of each knob in telling the best quarter of the trials from the rest, most important first.

    PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255) in Optuna's form for conditional spaces: a knob that only some
    methods have counts where it is.
    """
    knobs = {name for trial in made.trials for name in trial.params}
    if len(made.trials) < FEWEST or not knobs:
        return {}
    found: dict[str, float] = get_param_importances(
        made, evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    )
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _frozen(point: Mapping[str, Any], spread: Mapping[str, BaseDistribution], value: float | None) -> FrozenTrial:
    return create_trial(
        state=TrialState.COMPLETE,
        value=value,
        params=dict(point),
        distributions={key: spread[key] for key in point},
    )


def _as(spread: BaseDistribution, value: Any) -> Any:
    return str(value) if isinstance(spread, CategoricalDistribution) else float(value)


def _distributions(points: list[dict[str, Any]]) -> dict[str, BaseDistribution]:
    """Each knob's range, as far as it was seen."""
    made: dict[str, BaseDistribution] = {}
    for key in dict.fromkeys(key for point in points for key in point):
        values = [point[key] for point in points if key in point]
        if len(set(map(str, values))) < 2:
            continue
        if any(isinstance(value, str) for value in values):
            made[key] = CategoricalDistribution(sorted({str(value) for value in values}))
            continue
        low, high = float(min(values)), float(max(values))
        made[key] = FloatDistribution(low, high, log=low > 0 and high / low >= _LOG_FROM)
    return made
