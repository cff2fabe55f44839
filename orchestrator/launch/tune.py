"""Launch a search: a desk, packs that train, Ray Tune that decides, one writer, and the winner published at its end."""

import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from orchestrator.config import Search
from orchestrator.config.load import apply_overrides
from orchestrator.errors import CheckpointError, ConfigError, MantaError, RegistryError, TrainError
from orchestrator.launch.cluster import absolute_paths, join, require, restore_error, uses_gpu
from orchestrator.launch.desk import open_desk
from orchestrator.launch.pool import Pool, Shape
from orchestrator.launch.scribe import Scribe, StudyListener
from orchestrator.launch.signals import on_signal
from orchestrator.launch.train import finish, reason_of, storage_of
from orchestrator.launch.trial_store import TrialStore
from orchestrator.launch.tuner import build_tuner
from orchestrator.registry import Registry, TrackedRun, Version, check_alias, check_name
from orchestrator.search.lanes import lanes
from orchestrator.search.report import write_report
from orchestrator.search.space import size
from orchestrator.search.study import Record, Row, Study, folder_of, read_lines, read_record, write_record

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Of Tune, to see every trial to its end."""

_CHANGEABLE = ("cluster.", "shard=", "packs.", "budget")
"""What a resumed search may change: where and how long it runs, not what it learns."""


@dataclass(frozen=True)
class SearchOutcome:
    """What became of a search."""

    search_id: str
    """To resume it with."""
    why: str
    """``finished``, or what stopped it."""
    complete: bool
    """Whether it came to its own end: every trial has ended, or the budget is spent."""
    study: Study
    """Its trials."""
    winner: Row | None
    """The best one by the first objective; None where no trial has a value."""
    delta: Path | None
    """Folder of the winner's delta."""
    version: Version | None
    """The registered version."""
    tracking_uri: str
    """Where MLflow is."""

    @property
    def report(self) -> Path:
        """The page with the study's pictures."""
        return self.folder / "report.html"

    @property
    def folder(self) -> Path:
        """Ledger and report."""
        return folder_of(self.search_id)


def tune(
    search: Search,
    *,
    resume: str | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    listen: StudyListener | None = None,
) -> SearchOutcome:
    """Search for the best delta on the cluster, track every trial, and register the winner.

    Args:
        search: what to search; with ``resume`` the search as it was started counts instead.
        resume: id of an earlier search to go on with.
        overrides: ``cluster.``, ``packs.`` and ``budget`` settings to change at a resume.
        address: the Ray cluster; default: that of the job, else a local one.
        listen: hears the study after each change.

    Raises:
        MantaError: whatever went wrong, in one message; ``--resume`` goes on with what was done.
    """
    record = read_record(resume) if resume else None
    if record:
        record = replace(record, search=_elsewhere(record.search, overrides))
    search = Search.model_validate(record.search) if record else absolute_paths(search)
    registry = Registry(search.tracking)
    check_name(search.tracking.register_as or search.name)
    if search.tracking.alias:
        check_alias(search.tracking.alias)
    # A trial's process takes no core; Ray would warn of so many on few cores.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "64")
    join(address)
    gpu = uses_gpu(search)
    require(search, gpu=gpu)
    record = record or _new_record(search)
    tags = {**search.tracking.tags, "manta.search": record.id, "manta.storage": record.storage}
    settings = search.model_dump(mode="json", exclude={"tracking"})
    tracked = registry.start_run(search.name, settings, tags, run_id=record.mlflow_run)
    record = replace(record, mlflow_run=tracked.id)
    status = "FAILED"
    try:
        write_record(record)
        study, why = _search(search, record, registry, tracked, Shape.of(search, lanes(search), gpu=gpu), listen)
        outcome = _publish(search, record, registry, study, why)
        _report(outcome, tracked)
        status = "FINISHED" if outcome.complete else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except ray.exceptions.RayActorError as e:
        raise _with_hint(e, record.id) from e
    finally:
        finish(tracked, status)
    return outcome


def _elsewhere(search: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    if fixed := [o for o in overrides if not o.startswith(_CHANGEABLE)]:
        raise ConfigError(
            "--resume goes on with the search as it was started; only cluster, packs and budget may change, not "
            + ", ".join(fixed)
        )
    return apply_overrides(search, overrides, Search)


def _new_record(search: Search) -> Record:
    search_id = f"{search.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return Record(id=search_id, search=search.model_dump(mode="json"), storage=storage_of(search.cluster))


def _search(
    search: Search,
    record: Record,
    registry: Registry,
    tracked: TrackedRun,
    shape: Shape,
    listen: StudyListener | None,
) -> tuple[Study, str]:
    """Everything up to the last trial's end; the study, and why it is over."""
    folder = folder_of(record.id)
    study, lines = Study(search), list(read_lines(folder))
    for line in lines:
        study.hear(line["trial"], line["kind"], line["values"], line["at"])
    known = list(study.rows.values())
    desk = open_desk(search)
    ray.get(desk.recall.remote(lines))
    tags = {"manta.search": record.id}
    scribe = Scribe(study, desk, folder, registry, tracked.id, tags, listen or (lambda _: None))
    pool = Pool(search, desk, shape, record.storage, record.id)
    points = size(search) if search.sampler.type == "grid" else None
    trials = min((n for n in (search.budget.trials, points) if n is not None), default=None)
    if lines:
        scribe.note("resumed", {})
    with scribe.writing(), pool.running(), on_signal(desk.park.remote):
        for _ in range(_ATTEMPTS):
            with tempfile.TemporaryDirectory(prefix="manta-tune-") as temp:
                build_tuner(search, desk, known=known, trials=trials, at_once=shape.at_once, folder=Path(temp)).fit()
            known = ray.get(desk.rows.remote())
            if ray.get(desk.stopped.remote()) or not ray.get(desk.open.remote()):
                break  # else Tune gave a trial up whose actor it lost: the next attempt takes it up where it is
    why = ray.get(desk.stopped.remote()) or "finished"
    for error in (ray.get(desk.fatal.remote()), scribe.error, pool.error):
        if error:
            raise _with_hint(error, record.id)
    if all(row.why for row in study.rows.values()):
        scribe.note("over", {"reason": why})
    return study, why


def _with_hint(error: Any, search_id: str) -> MantaError:
    go_on = f"what has finished is kept. Go on with: manta tune --resume {search_id}"
    if isinstance(error, tuple):
        kind, message = error
        made = restore_error(kind, f"{message}; {go_on}")
        return made if isinstance(made, MantaError) else TrainError(str(made))
    if isinstance(error, MantaError):
        return type(error)(f"{error}; {go_on}")
    return TrainError(f"a part of the search was lost: {reason_of(error)}; {go_on}")


def _publish(search: Search, record: Record, registry: Registry, study: Study, why: str) -> SearchOutcome:
    """Register the winner, once the search is over."""
    complete, winner = study.over is not None, study.winner()
    delta, version = None, None
    if complete and winner is None:
        reasons = {row.reason for row in study.rows.values() if row.reason}
        raise TrainError(
            f"no trial of {record.id} has a value for {study.metrics[0]}"
            + (f"; {len(study.rows)} of {len(study.rows)} failed: {'; '.join(sorted(reasons)[:3])}" if reasons else "")
        )
    if complete and winner is not None:
        delta = folder_of(record.id) / "winner"
        with TrialStore(f"{record.storage}/{record.id}/trials").latest(winner.trial) as found:
            if found is None:
                raise CheckpointError(f"{record.storage} no longer holds the checkpoint of {winner.trial}, the winner")
            best, last = found / winner.trial / "best", found / winner.trial / "delta"
            shutil.rmtree(delta, ignore_errors=True)
            shutil.copytree(best if best.is_dir() else last, delta)
        version = _register(search, record, registry, study, winner, delta)
    return SearchOutcome(record.id, why, complete, study, winner, delta, version, registry.uri)


def _report(outcome: SearchOutcome, tracked: TrackedRun) -> None:
    """A page with the study's pictures; one that cannot be written does not cost a search."""
    if not outcome.study.rows:
        return
    try:
        tracked.attach(write_report(outcome.study, outcome.report))
    except OSError as e:
        _log.warning("no report: %s", e)


def _register(search: Search, record: Record, registry: Registry, study: Study, winner: Row, delta: Path) -> Version:
    tags = {
        **search.tracking.tags,
        "manta.search": record.id,
        "manta.trial": winner.trial,
        "manta.trials": str(len(study.rows)),
    }
    try:
        run = None
        if winner.mlflow_run:
            run = registry.start_run(winner.trial, tags={"manta.winner": record.id}, run_id=winner.mlflow_run)
        version = registry.publish(
            delta,
            name=search.tracking.register_as or search.name,
            run=run,
            metrics=winner.metrics,
            alias=search.tracking.alias,
            tags=tags,
            owner=search.tracking.owner,
        )
        if run:
            finish(run, "FINISHED")
    except RegistryError as e:
        raise RegistryError(
            f"{e}. The winner is trained and whole in {delta}; register it once the server answers, with: "
            f"manta tune --resume {record.id}"
        ) from e
    return version
