"""The cluster: join it, ask what it offers, refuse what it cannot give."""

import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any, TypeVar

import ray

from orchestrator.config import Run, Search
from orchestrator.errors import ClusterError, TrainError

AnyRun = TypeVar("AnyRun", Run, Search)


def join(address: str | None = None) -> None:
    """Connect to the cluster at ``address``, else this job's own, else one that runs here, else start a local one.

    Raises:
        ClusterError: there is none at the address, or it runs other versions.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    try:
        ray.init(
            address=address,
            log_to_driver=bool(os.environ.get("MANTA_WORKER_LOGS")),
            logging_level="ERROR",
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ClusterError(
            f"cannot join the Ray cluster{f' at {address}' if address else ''}: {first}{_token_hint(address)}"
        ) from e


def _token_hint(address: str | None) -> str:
    """Ray looks for a token by itself only where it finds the cluster by itself, and does not say so."""
    if not address or os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return ""
    return ". If it is up, it may ask for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token"


def describe(address: str | None = None) -> dict[str, Any]:
    """Nodes, CPUs, GPUs, their kinds as far as Ray knows them, and versions of the cluster.

    Raises:
        ClusterError: it cannot be joined.
    """
    join(address)
    total = ray.cluster_resources()
    return {
        "nodes": sum(1 for node in ray.nodes() if node["Alive"]),
        "cpus": total.get("CPU", 0.0),
        "gpus": total.get("GPU", 0.0),
        "accelerators": sorted(k.partition(":")[2] for k in total if k.startswith("accelerator_type:")),
        "ray": ray.__version__,
        "python": platform.python_version(),
    }


def uses_gpu(run: Run | Search) -> bool:
    """Whether workers get a GPU."""
    asked = run.cluster.gpus_per_worker
    return ray.cluster_resources().get("GPU", 0) > 0 if asked == "auto" else asked == 1


def require(run: Run | Search, *, gpu: bool) -> None:
    """Refuse at once what would otherwise wait for ever.

    Raises:
        ClusterError: the cluster offers too little.
    """
    total = ray.cluster_resources()
    need = run.cluster.workers.min
    cpus = need * run.cluster.cpus_per_worker
    if os.environ.get("MANTA_AUTOSCALING"):
        return  # what is not there yet may come
    if gpu and total.get("GPU", 0) < need:
        raise ClusterError(
            f"{need} workers need a GPU each, the cluster has {total.get('GPU', 0):g}; lower cluster.workers, set "
            "cluster.gpus_per_worker=0, or set MANTA_AUTOSCALING=1 where an autoscaler will add nodes"
        )
    largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if largest < run.cluster.cpus_per_worker:
        raise ClusterError(
            f"a worker needs {run.cluster.cpus_per_worker:g} CPU on one node, the largest has {largest:g}; lower "
            "cluster.cpus_per_worker, or set MANTA_AUTOSCALING=1"
        )
    if total.get("CPU", 0) < cpus:
        raise ClusterError(
            f"{need} workers of {run.cluster.cpus_per_worker:g} CPU need {cpus:g}, the cluster has "
            f"{total.get('CPU', 0):g}; lower cluster.workers or cluster.cpus_per_worker, or set MANTA_AUTOSCALING=1"
        )


def refuse_a_trap() -> None:
    """A run inside a trial of Ray Tune frees its workers through the dashboard when the trial is stopped. Without one
    they stay, and after some trials nothing can start any more.

    Raises:
        ClusterError: this is such a trial, and the dashboard does not answer.
    """
    if "ray.tune" not in sys.modules:
        return
    from ray import tune
    from ray.util.state import list_placement_groups

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # outside of a trial Ray warns, and says None
        trial = tune.get_context().get_trial_id()
    if not trial:
        return
    try:
        list_placement_groups(limit=1, timeout=5)
    except Exception as e:
        raise ClusterError(
            f"a training run inside the Ray Tune trial {trial} needs Ray's dashboard, which does not answer: stopped "
            "trials would keep their workers, and the search would hang. Search with `manta tune`, which does not "
            "nest runs, or start Ray with ray[default] and include_dashboard=True"
        ) from e


def worker_env(*, gpu: bool) -> dict[str, str]:
    """Environment of the workers. No secret: Ray shows it; a node has its own HF_TOKEN, a local one this process's."""
    passed = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "MANTA_HOME", "OMP_NUM_THREADS")
    env = {key: os.environ[key] for key in passed if key in os.environ}
    env |= {"TOKENIZERS_PARALLELISM": "false", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    return env if gpu else env | {"DS_ACCELERATOR": "cpu"}


def absolute_paths(run: AnyRun) -> AnyRun:
    """The run with local paths made absolute: workers start in another directory."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else path

    sources = {
        key: tuple(s.model_copy(update={"path": _glob(s.path, absolute)}) for s in getattr(run.data, key))
        for key in ("train", "eval")
    }
    return run.model_copy(
        update={
            "base": run.base.model_copy(update={"id": run.base.id if run.base.id == "demo" else absolute(run.base.id)}),
            "data": run.data.model_copy(update=sources),
        }
    )


def _glob(path: str, absolute: Any) -> str:
    if path == "demo":
        return path
    is_glob = any(c in path for c in "*?[") and "://" not in path
    return str(Path(path).expanduser().absolute()) if is_glob else absolute(path)


def restore_error(kind: str, message: str) -> Exception:
    """The error that a worker named."""
    from orchestrator import errors

    found = getattr(errors, kind, TrainError)
    made: Exception = found(message)
    return made
