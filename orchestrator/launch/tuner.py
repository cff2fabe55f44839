"""Ray Tune for a search: what proposes trials, what stops them, and the actors that stand for them."""

import os
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from orchestrator.config.search import HELD_OUT, Search
from orchestrator.launch.trial import TrialActor, trial_id
from orchestrator.search.propose import NUMBER, numbered_sampler, points, propose
from orchestrator.search.study import Row, direction

_RETRIES = 8
"""Of a trial's actor, which holds nothing that would be lost with it."""
_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the study is the log
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours writes checkpoints first
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has none
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # a search goes on from its study, not from Tune's state
    "TUNE_FORCE_TRIAL_CLEANUP_S": "30",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "-1",  # Ray's own spelling
    "RAY_AIR_NEW_OUTPUT": "0",
}


def build_tuner(
    search: Search, desk: Any, *, known: Iterable[Row], trials: int | None, at_once: int, folder: Path
) -> tune.Tuner:
    """A tuner over trials that wait at the desk.

    Args:
        search: what to search.
        desk: the desk's actor.
        known: trials of an earlier driver; they are proposed again first, and hear their evaluations again.
        trials: how many in all, those included; None for no end.
        at_once: trials that Tune keeps at the desk.
        folder: for Tune's own files, which nothing is read back from.
    """
    os.environ.update(_SETTINGS)
    metrics = [objective.metric for objective in search.objective]
    modes = [direction(metric) for metric in metrics]
    several = len(metrics) > 1
    searcher = _Searcher(
        space=partial(propose, search),
        metric=metrics if several else metrics[0],
        mode=modes if several else modes[0],
        sampler=numbered_sampler(search),
        points_to_evaluate=points(search, known),
    )
    # On the driver's own node: a lost worker node then takes no trial with it.
    here = {"CPU": 0, f"node:{ray.util.get_node_ip_address()}": 0.0001}
    actor = tune.with_resources(tune.with_parameters(TrialActor, desk=desk), tune.PlacementGroupFactory([here]))
    return tune.Tuner(
        actor,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(search),
            num_samples=-1 if trials is None else trials,
            max_concurrent_trials=at_once,
            reuse_actors=True,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            stop=_Stopped(desk),
            failure_config=tune.FailureConfig(max_failures=_RETRIES, fail_fast=False),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[_Withdrawn(desk)],
            verbose=0,
        ),
    )


class _Searcher(OptunaSearch):  # type: ignore[misc]
    """A trial whose actor was lost tells its evaluations twice; optuna keeps the first word and warns."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """As Ray's; of a metric that is not known yet, a latency say, there is nothing to tell."""
        if isinstance(self.metric, str) and self.metric not in result:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            super().on_trial_result(trial_id, result)


def _scheduler(search: Search) -> TrialScheduler:
    """What stops trials; their time is told in tenths of their own length, each with an evaluation.

    Trials are compared on the first held-out objective: by size or speed, which training does not change, the better
    half of a front would be stopped at once.
    """
    asked = search.scheduler
    if asked.type == "none":
        return FIFOScheduler()
    metric = next(o.metric for o in search.objective if o.metric in HELD_OUT)
    mode = direction(metric)
    if asked.type == "asha":
        return AsyncHyperBandScheduler(
            time_attr="tenth",
            metric=metric,
            mode=mode,
            max_t=max(10, asked.grace),
            grace_period=asked.grace,
            reduction_factor=asked.reduction,
            stop_last_trials=False,
        )
    return MedianStoppingRule(time_attr="tenth", metric=metric, mode=mode, grace_period=asked.grace)


def _folder_name(trial: Any) -> str:
    return trial_id(trial.config[NUMBER])


class _Withdrawn(tune.Callback):  # type: ignore[misc]
    """Tells the desk at once of trials that Tune is done with; of those that ended by themselves it knows."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Stopped, or at its end."""
        self._desk.withdraw.remote(trial_id(trial.config[NUMBER]))


class _Stopped(tune.Stopper):  # type: ignore[misc]
    """Ends the search when the desk says so."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Single trials are the scheduler's."""
        return False

    def stop_all(self) -> bool:
        """Asked between any two events."""
        return ray.get(self._desk.stopped.remote()) is not None
