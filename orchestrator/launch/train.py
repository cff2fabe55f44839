"""Launch a run: Ray Train workers, one mailbox, one writer to MLflow, and the delta published at its end."""

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.config import Cluster, Run, home
from orchestrator.config.load import apply_overrides
from orchestrator.delta import FILES, load_delta
from orchestrator.errors import CheckpointError, ClusterError, ConfigError, MantaError, RegistryError, TrainError
from orchestrator.launch import ledger
from orchestrator.launch.cluster import (
    absolute_paths,
    join,
    refuse_a_trap,
    require,
    restore_error,
    uses_gpu,
    worker_env,
)
from orchestrator.launch.mailbox import open_mailbox
from orchestrator.launch.signals import on_signal
from orchestrator.launch.storage import as_checkpoint, is_full, rescue
from orchestrator.launch.worker import train_worker
from orchestrator.registry import Registry, TrackedRun, Version, check_alias, check_name

_log = logging.getLogger(__name__)

Listener = Callable[[str, dict[str, Any]], None]
"""Hears every event of the workers."""
PATIENCE_S = 4 * 3600
"""A worker waits this long for the first one, which may be tokenizing a large set for all."""
_METRICS = {
    "step": ("loss", "lr", "grad_norm", "tokens_per_s", "memory_gib", "skipped_steps"),
    "eval": ("eval_loss", "accuracy", "f1", "mcc"),
}


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    run_id: str
    """To resume it with."""
    why: str
    """``finished``, ``stopped early``, or what stopped it."""
    delta: Path
    """Folder of the delta: the best where there was a held-out set, else the last."""
    metrics: dict[str, float]
    """Last and best metrics."""
    version: Version | None
    """The registered version; None where the run was stopped before its end."""
    tracking_uri: str
    """Where MLflow is."""

    @property
    def complete(self) -> bool:
        """Whether it came to its own end."""
        return self.version is not None


def train(
    run: Run,
    *,
    resume: str | None = None,
    overrides: Sequence[str] = (),
    address: str | None = None,
    listen: Listener | None = None,
) -> Outcome:
    """Train one delta on the cluster, track it, and register it.

    Args:
        run: what to do; with ``resume`` the run as it was started counts instead.
        resume: id of an earlier run to go on with.
        overrides: ``cluster.`` settings to change at a resume; the rest of a run is fixed once it has begun.
        address: the Ray cluster; default: that of the job, else a local one.
        listen: hears progress.

    Raises:
        MantaError: whatever went wrong, in one message; what was done is in the last checkpoint.
    """
    entry = ledger.read(resume) if resume else None
    if entry:
        entry = replace(entry, run=_elsewhere(entry.run, overrides))
    run = Run.model_validate(entry.run) if entry else absolute_paths(run)
    registry = Registry(run.tracking)
    check_name(run.tracking.register_as or run.name)
    if run.tracking.alias:
        check_alias(run.tracking.alias)
    parent = _parent(run.train.init_from, registry) if run.train.init_from and not entry else None
    join(address)
    refuse_a_trap()
    gpu = uses_gpu(run)
    require(run, gpu=gpu)
    entry = entry or _new_entry(run, parent)
    settings = run.model_dump(mode="json", exclude={"tracking"})
    if settings["task"].get("labels", ()) is None:
        del settings["task"]["labels"]  # the workers read them off the records
    tracked = registry.start_run(run.name, settings, _tags(run, entry), run_id=entry.mlflow_run)
    entry = replace(entry, mlflow_run=tracked.id)
    try:
        ledger.write(entry)
        why, metrics, checkpoint = _fit(run, entry, tracked, gpu=gpu, listen=listen or (lambda *_: None))
        outcome = _publish(run, entry, registry, tracked, why, metrics, checkpoint)
    except BaseException as e:
        finish(tracked, "KILLED" if isinstance(e, KeyboardInterrupt) else "FAILED")
        raise
    finish(tracked, "FINISHED" if outcome.complete else "KILLED")
    return outcome


def _elsewhere(run: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The run with other workers or resources; its learning stays what it was."""
    if fixed := [o for o in overrides if not o.startswith(("cluster.", "shard="))]:
        raise ConfigError(
            f"--resume goes on with the run as it was started; only cluster settings may change, not {', '.join(fixed)}"
        )
    return apply_overrides(run, overrides)


def _new_entry(run: Run, parent: Path | None) -> ledger.Entry:
    run_id = f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    storage = storage_of(run.cluster)
    start = None
    if parent is not None:
        start = home() / "runs" / f"{run_id}-start"  # outlives the folder it came from
        shutil.copytree(parent, start, ignore=lambda _, names: set(names) - set(FILES))
    pinned = run.model_dump(mode="json")  # a later version's defaults do not change a run that is under way
    pinned["method"] = run.method.model_dump(mode="json", exclude_unset=start is not None) | {"type": run.method.type}
    return ledger.Entry(run_id, storage, pinned, None, str(start) if start else None)


def storage_of(cluster: Cluster) -> str:
    """Where checkpoints go; a local folder is made.

    Raises:
        ClusterError: it cannot be.
    """
    storage = cluster.storage or str(home() / "storage")
    if "://" not in storage:
        storage = str(Path(storage).expanduser().absolute())
        try:
            Path(storage).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ClusterError(f"cluster.storage {storage} cannot be written: {e}") from e
    return storage


def _parent(ref: str, registry: Registry) -> Path:
    """The delta to continue from; checked here, before anything is started."""
    source = Path(ref).expanduser()
    found = source if source.is_dir() else registry.fetch(ref)
    load_delta(found)
    return found


def _fit(
    run: Run, entry: ledger.Entry, tracked: TrackedRun, *, gpu: bool, listen: Listener
) -> tuple[str, dict[str, float], Any]:
    mailbox = open_mailbox()
    workers = run.cluster.workers
    rescued = rescue(entry.storage, entry.id, run.name)
    trainer = Trainer(
        train_worker,
        train_loop_config={
            "run": without_uri(entry.run),
            "mailbox": mailbox,
            "start": _files(entry.start),
            "rescued": rescued,
            "threads": 0 if gpu else max(1, int(run.cluster.cpus_per_worker)),
        },
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=PATIENCE_S),
        scaling_config=ScalingConfig(
            num_workers=workers.min if workers.min == workers.max else (workers.min, workers.max),
            use_gpu=gpu,
            resources_per_worker={"CPU": run.cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=entry.id,
            storage_path=entry.storage,
            failure_config=FailureConfig(max_failures=run.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=run.train.keep),
            worker_runtime_env={"env_vars": worker_env(gpu=gpu)},
        ),
    )
    last: dict[str, Any] = {}
    try:
        with _drained(mailbox, tracked, listen, last), on_signal(mailbox.stop.remote):
            result = trainer.fit()
    except MantaError:
        raise
    except Exception as e:
        if fatal := ray.get(mailbox.fatal.remote()):
            raise restore_error(*fatal) from None
        if is_full(e):
            raise CheckpointError(
                f"no space left in {entry.storage}; the checkpoints before are whole. Make room, then go on with: "
                f"manta train --resume {entry.id}"
            ) from e
        raise TrainError(
            f"the workers failed: {reason_of(e)}. Go on from the last checkpoint with: manta train --resume {entry.id}"
        ) from e
    if fatal := ray.get(mailbox.fatal.remote()):
        raise restore_error(*fatal)
    checkpoint = result.checkpoint or as_checkpoint(rescued)
    if "why" not in last or checkpoint is None:
        raise TrainError(f"the workers ended without a word; go on with: manta train --resume {entry.id}")
    why = last.pop("why")
    last.pop("step", None)
    return why, {k: float(v) for k, v in last.items()}, checkpoint


def without_uri(run: dict[str, Any]) -> dict[str, Any]:
    """Workers do not track, and a URI may hold a password."""
    return {**run, "tracking": {k: v for k, v in run.get("tracking", {}).items() if k != "uri"}}


def _files(folder: str | None) -> dict[str, bytes] | None:
    """The delta to continue from, to be sent to every node."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name in FILES} if folder else None


def _publish(
    run: Run,
    entry: ledger.Entry,
    registry: Registry,
    tracked: TrackedRun,
    why: str,
    metrics: dict[str, float],
    checkpoint: Any,
) -> Outcome:
    delta = home() / "runs" / entry.id
    with checkpoint.as_directory() as folder:
        best, last = Path(folder) / run.name / "best", Path(folder) / run.name / "delta"
        shutil.rmtree(delta, ignore_errors=True)
        shutil.copytree(best if best.is_dir() else last, delta)
    version = None
    if why in ("finished", "stopped early"):
        try:
            version = registry.publish(
                delta,
                name=run.tracking.register_as or run.name,
                run=tracked,
                metrics=metrics,
                alias=run.tracking.alias,
                tags=run.tracking.tags,
                owner=run.tracking.owner,
            )
        except RegistryError as e:
            raise RegistryError(
                f"{e}. The delta is trained and whole in {delta}; register it once the server answers, with: "
                f"manta train --resume {entry.id}"
            ) from e
    return Outcome(entry.id, why, delta, metrics, version, registry.uri)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray's trainer, without its SIGINT handler: that one aborts, ours writes a checkpoint first."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


@contextmanager
def _drained(mailbox: Any, tracked: TrackedRun, listen: Listener, last: dict[str, Any]) -> Iterator[None]:
    """Events go to MLflow and the listener from one thread of the driver, the only writer."""
    ended = threading.Event()

    def drain() -> None:
        while True:
            over = ended.is_set()
            for kind, values in ray.get(mailbox.drain.remote()):
                if kind == "done":
                    last.update(values)
                if kind == "data" and "labels" in values["task"]:
                    tracked.settle({"task": {"labels": values["task"]["labels"]}})
                if keys := _METRICS.get(kind):
                    tracked.log({k: values[k] for k in keys if k in values}, step=values["step"])
                try:
                    listen(kind, values)
                except Exception:  # a closed terminal, say, does not cost a run
                    _log.warning("the listener failed at %s", kind, exc_info=True)
            if over:
                return
            ended.wait(0.3)

    thread = threading.Thread(target=drain, name="manta-drain", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=60)


def finish(tracked: TrackedRun, status: str) -> None:
    """End the MLflow run. A server that is away by now neither costs a delta that is written nor hides an error."""
    try:
        tracked.finish(status)
    except RegistryError as e:
        _log.warning("%s", e)


def reason_of(error: Exception) -> str:
    """The last line of what a worker said."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values()), error) if failures else error
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(inner).__name__


def _tags(run: Run, entry: ledger.Entry) -> dict[str, str]:
    owner = {"owner": run.tracking.owner} if run.tracking.owner else {}
    return {**run.tracking.tags, **owner, "manta.run": entry.id, "manta.storage": entry.storage}
