"""The one writer of a search: what the desk hears goes to the study's ledger, to MLflow and to the listener."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from orchestrator.config import Run
from orchestrator.errors import CheckpointError, MantaError, RegistryError
from orchestrator.registry import Registry, TrackedRun
from orchestrator.search.study import Row, Study, append

_log = logging.getLogger(__name__)

StudyListener = Callable[[Study], None]
"""Hears the study after each change."""
_PAUSE_S = 0.3
_METRICS = {
    "step": ("loss", "lr", "grad_norm"),
    "eval": ("eval_loss", "accuracy", "f1", "mcc"),
}
_STATUS = {"finished": "FINISHED", "stopped early": "FINISHED", "withdrawn": "KILLED", "failed": "FAILED"}


class Scribe:
    """Drains the desk in a thread of the driver, and says when the budget is spent.

    Attributes:
        error: what keeps it from writing the ledger, a full disk say; the search is parked then.
    """

    def __init__(
        self,
        study: Study,
        desk: Any,
        folder: Path,
        registry: Registry,
        parent: str,
        tags: dict[str, str],
        listen: StudyListener,
    ) -> None:
        self._study, self._desk, self._folder = study, desk, folder
        self._registry, self._parent, self._tags, self._listen = registry, parent, tags, listen
        self._runs: dict[str, TrackedRun] = {}
        self._began, self._spent = time.monotonic(), study.active_seconds
        self.error: Exception | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write until the block ends, and then what is left."""
        ended = threading.Event()
        thread = threading.Thread(target=self._run, args=(ended,), name="manta-scribe", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=120)
            for trial in list(self._runs):
                self._finish(trial, "KILLED")

    def note(self, kind: str, values: dict[str, Any]) -> None:
        """Write a line of the search itself."""
        self._write([("", kind, values)])

    def _run(self, ended: threading.Event) -> None:
        while True:
            over = ended.is_set()
            try:
                if events := ray.get(self._desk.drain.remote()):
                    self._take(events)
                self._budget()
            except ray.exceptions.RayActorError as e:
                self.error = self.error or e
                return
            if over:
                return
            ended.wait(_PAUSE_S)

    def _take(self, events: list[tuple[str, str, dict[str, Any]]]) -> None:
        self._write(events)
        for trial, kind, values in events:
            if trial:
                self._track(trial, kind, values)
        try:
            self._listen(self._study)
        except Exception:  # a closed terminal, say, does not cost a search
            _log.warning("the listener failed", exc_info=True)

    def _write(self, events: list[tuple[str, str, dict[str, Any]]]) -> None:
        try:
            at = append(self._folder, events)
        except OSError as e:
            at = time.time()
            if self.error is None:
                self.error = CheckpointError(f"the study in {self._folder} cannot be written: {e}")
                self._desk.fail.remote("CheckpointError", str(self.error))
        for trial, kind, values in events:
            self._study.hear(trial, kind, values, at)

    def _budget(self) -> None:
        budget = self._study.search.budget
        seconds = self._spent + time.monotonic() - self._began
        if budget.tokens and self._study.tokens >= budget.tokens:
            self._desk.finish.remote(f"budget.tokens: {budget.tokens:,} are spent")
        elif budget.hours and seconds >= budget.hours * 3600:
            self._desk.finish.remote(f"budget.hours: {budget.hours:g} are over")

    # -- MLflow

    def _track(self, trial: str, kind: str, values: dict[str, Any]) -> None:
        if kind in ("joined", "ended") and trial not in self._runs:
            self._start(trial)
        if (run := self._runs.get(trial)) is None:
            return
        if keys := _METRICS.get(kind):
            run.log({k: values[k] for k in keys if k in values}, step=values["step"])
        if kind in ("joined", "eval"):
            row = self._study.rows[trial]
            sizes = {k: v for k in ("parameters", "memory", "latency") if (v := row.value(k)) is not None}
            run.log(sizes, step=row.step)
        if kind == "ended":
            if values.get("reason"):
                run.settle({"reason": values["reason"]})
            self._finish(trial, _STATUS[values["why"]])

    def _start(self, trial: str) -> None:
        row = self._study.rows[trial]
        tags = {**self._tags, "manta.trial": trial, "manta.method": row.method}
        try:
            run = self._registry.start_run(
                f"{self._study.search.name} {trial}", _params(row), tags, run_id=row.mlflow_run, parent=self._parent
            )
        except RegistryError as e:
            _log.warning("%s is not in MLflow: %s", trial, e)
            return
        self._runs[trial] = run
        if run.id != row.mlflow_run:
            self._write([(trial, "tracked", {"mlflow_run": run.id})])

    def _finish(self, trial: str, status: str) -> None:
        if run := self._runs.pop(trial, None):
            try:
                run.finish(status)
            except MantaError as e:
                _log.warning("%s", e)


def _params(row: Row) -> dict[str, Any]:
    """A trial's config; of one that has none, its point."""
    if not row.run:
        return {"point": row.params}
    settings = Run.model_validate(row.run).model_dump(mode="json", exclude={"tracking", "cluster"})
    if settings["task"].get("labels", ()) is None:
        del settings["task"]["labels"]
    return settings
