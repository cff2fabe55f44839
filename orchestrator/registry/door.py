"""The one way to MLflow: its client, its retries and its errors."""

import contextlib
import fcntl
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.config import Tracking
from orchestrator.delta import redact
from orchestrator.errors import RegistryError
from orchestrator.registry.address import resolve_address

_LOCK = threading.RLock()  # MLflow reads its retry settings from the process's environment at each request
_QUIET = ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "urllib3.connectionpool")
_AWAY = re.compile(r"(?i)failed with (?:timeout )?exception|max retries|connection|timed? ?out|database is locked")
_CAUSE = re.compile(
    r"(?i)connection refused|timed out|name or service not known|temporary failure in name resolution"
    r"|no route to host|network is unreachable|certificate verify failed|connection reset|too many \d+ error responses"
)
_DATABASE = re.compile(r"^\([\w.]*Error\) .+", re.M)
"""What the database itself says, below SQLAlchemy's own words."""
_FINAL = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE"}


class Refused(RegistryError):
    """The server answered, and will answer the same next time."""


class Missing(Refused):
    """What was asked for is not there."""


class Door:
    """A client of one tracking store; knows how long to wait and how to say what went wrong.

    Raises:
        RegistryError: an unusable URI, or a store that cannot be reached (within about ten seconds).
    """

    def __init__(self, tracking: Tracking):
        self.tracking = tracking
        self.address = resolve_address(tracking.uri)
        self._experiment: str | None = None
        with self.reach("open it", retries=1, timeout_s=4):
            if self.address.file is None:
                self.client = self._open()
            else:
                # Two processes that create the tables at once leave neither usable.
                self.address.file.parent.mkdir(parents=True, exist_ok=True)
                with self.address.file.with_name(f"{self.address.file.name}.lock").open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    self.client = self._open()

    def _open(self) -> MlflowClient:
        client = MlflowClient(self.address.uri, self.address.uri)
        client.search_experiments(max_results=1)
        return client

    @contextlib.contextmanager
    def reach(self, what: str, *, retries: int = 2, timeout_s: int = 30) -> Iterator[None]:
        """Around every call: bounded patience inside, and one RegistryError that says ``what`` was being done."""
        settings = {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        }
        try:
            with _LOCK, _environment(settings), _quiet():
                yield
        except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
            # Without the cause: its text and that of its own causes may hold credentials.
            raise self._told(what, error) from None

    def _told(self, what: str, error: Exception) -> RegistryError:
        text = redact(str(error)).strip()
        code = getattr(error, "error_code", None)
        if code == "RESOURCE_DOES_NOT_EXIST":
            return Missing(f"MLflow at {self.address.shown} could not {what}: {_short(text)}")
        if code in _FINAL:
            return Refused(f"MLflow at {self.address.shown} refused to {what}: {_short(text)}")
        if self.address.remote and (isinstance(error, OSError) or _AWAY.search(text)):
            cause = match.group(0).lower() if (match := _CAUSE.search(text)) else _short(text)
            return RegistryError(
                f"cannot reach MLflow at {self.address.shown} to {what}: {cause}; start the server, or correct "
                "tracking.uri or $MLFLOW_TRACKING_URI (without either, a local sqlite file is used)"
            )
        return RegistryError(f"MLflow at {self.address.shown} could not {what}: {_short(text)}")

    def experiment(self) -> str:
        """Id of the experiment, made where it is missing."""
        if self._experiment is None:
            name = self.tracking.experiment
            with self.reach(f"open experiment {name!r}"):
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    try:
                        self._experiment = self.client.create_experiment(name, self.address.artifacts)
                    except MlflowException:
                        found = self.client.get_experiment_by_name(name)  # another process was faster
                        if found is None:
                            raise
                if found is not None:
                    if found.lifecycle_stage != "active":
                        raise RegistryError(
                            f"experiment {name!r} at {self.address.shown} is deleted; restore it with `mlflow "
                            f"experiments restore -x {found.experiment_id}`, or choose another tracking.experiment"
                        )
                    self._experiment = found.experiment_id
        return str(self._experiment)


def _short(text: str) -> str:
    said = _DATABASE.search(text)
    first = said.group() if said else text.splitlines()[0] if text else "no reason given"
    return first if len(first) <= 300 else f"{first[:300]}…"


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set what the user has not set, for the time of one call."""
    added = [key for key in settings if key not in os.environ]
    os.environ.update({key: settings[key] for key in added})
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep migrations and retries out of the user's log; the error says it once."""
    loggers = [logging.getLogger(name) for name in _QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # MLflow logs a database's error with its traceback, at each try
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
