"""Evaluations in MLflow: a run each, and on the version what a promotion compares."""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from orchestrator.delta import login
from orchestrator.registry.door import Door
from orchestrator.registry.limits import clean_key, flat_params, flat_tags
from orchestrator.registry.versions import RECORD, Version


@dataclass(frozen=True)
class Evaluation:
    """One set's metrics of one delta or base."""

    ref: str
    """What was evaluated."""
    sha256: str | None
    """Hash of its tensors; None for the bare base."""
    base: str
    """The base's id."""
    source_hash: str
    """Hash of the base's source weights."""
    recipe: str
    """How it was held."""
    data: str
    """The set's path."""
    digest: str
    """sha256 of its records."""
    records: int
    """How many."""
    settings: Mapping[str, Any]
    """What else the metrics depend on."""
    metrics: Mapping[str, float]
    """What was found."""

    @property
    def key(self) -> str:
        """Equal where metrics may be compared: same records, base held in the same way, same settings."""
        held = self.recipe.partition(",")[0]  # which layers a method keeps unquantized is its own affair
        parts = json.dumps([self.digest, held, self.settings], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    @property
    def set_name(self) -> str:
        """A short name of the set, for tags."""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.data).stem).strip("-") or "set"


def log_evaluation(door: Door, done: Evaluation, version: Version | None, file: Path) -> str:
    """A finished run with metrics, parameters and the predictions; its metrics as tags of the version. The run's id."""
    client, experiment, now = door.client, door.experiment(), int(time.time() * 1000)
    tracking = door.tracking
    tags = flat_tags({**tracking.tags, "manta.eval": done.set_name, "mlflow.user": tracking.owner or login()})
    params = {k: v for k, v in asdict(done).items() if k not in ("metrics", "settings")} | dict(done.settings)
    with door.reach(f"log the evaluation of {done.ref!r}", timeout_s=60):
        run_id: str = client.create_run(experiment, tags=tags, run_name=f"eval {done.ref} {done.set_name}").info.run_id
        try:
            model = version.tags.get("manta.model_id") if version else None
            link = {"model_id": model, "dataset_name": done.set_name, "dataset_digest": done.digest[:32]}
            values = [Metric(clean_key(k), v, now, 0, **link) for k, v in done.metrics.items()]
            items = [Param(k, v) for k, v in flat_params(params).items()]
            client.log_batch(run_id, metrics=values, params=items, synchronous=True)
            client.log_artifact(run_id, str(file))
            if version is not None:
                client.log_batch(run_id, tags=[RunTag("manta.version", version.ref)], synchronous=True)
                for key, value in _tags(done, version, run_id).items():
                    client.set_model_version_tag(version.name, str(version.version), key, value)
            client.set_terminated(run_id)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                client.set_terminated(run_id, "FAILED")
            raise
    return run_id


def _tags(done: Evaluation, version: Version, run_id: str) -> dict[str, str]:
    before = version.evaluations.get(done.key, {})
    record = {
        "data": done.data,
        "digest": done.digest,
        "recipe": done.recipe,
        "records": done.records,
        "run": run_id,
        "at": datetime.now(UTC).isoformat(),
        "metrics": {**before.get("metrics", {}), **done.metrics},
    }
    short = {f"manta.eval.{done.set_name}.{name}": f"{value:.6g}" for name, value in done.metrics.items()}
    return {f"{RECORD}{done.key}": json.dumps(record), **short}
