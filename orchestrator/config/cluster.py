"""Where the run runs: workers, ZeRO, tracking."""

from typing import Any, Literal

from pydantic import Field, model_validator

from orchestrator.config.strict import Strict


class Workers(Strict):
    """How many workers; a range makes the run elastic."""

    min: int = Field(ge=1)
    """Fewest to go on with."""
    max: int = Field(ge=1)
    """Most to use."""

    @model_validator(mode="after")
    def _ordered(self) -> "Workers":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class Zero(Strict):
    """How DeepSpeed shards the base."""

    stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage; 3 shards the base. ``auto``: 3 where one copy would fill over half of a device, else 0."""
    offload: Literal["none", "cpu"] = "none"
    """Hold the base's shards in host memory (stage 3)."""
    persistence_threshold: int = Field(default=100_000, ge=0)
    """Tensors with fewer elements stay whole on every rank (stage 3)."""
    overrides: dict[str, Any] = {}
    """Further keys of DeepSpeed's ``zero_optimization`` section, taken as they are."""


class Cluster(Strict):
    """Workers and their resources."""

    workers: Workers = Workers(min=1, max=1)
    """A number, or ``{min, max}`` for an elastic run."""
    gpus_per_worker: Literal["auto", 0, 1] = "auto"
    """``auto``: one where the cluster has any."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """Cores that Ray reserves for a worker."""
    storage: str | None = None
    """Folder for checkpoints, reachable from every node; default ``$MANTA_HOME/storage``."""
    max_failures: int = Field(default=3, ge=-1)
    """Restarts after lost workers before the run is given up; -1 for no limit."""
    zero: Zero = Zero()
    """ZeRO settings."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(n := value.get("workers"), int) and not isinstance(n, bool):
            return {**value, "workers": {"min": n, "max": n}}
        return value


class Tracking(Strict):
    """MLflow."""

    uri: str | None = None
    """Tracking URI; default ``$MLFLOW_TRACKING_URI``, else a sqlite file in ``$MANTA_HOME``."""
    experiment: str = "manta"
    """Experiment of the run."""
    register_as: str | None = None
    """Name in the model registry; default: the run's name."""
    alias: str | None = "candidate"
    """Alias that the new version gets; null for none."""
    owner: str | None = None
    """Owner of run and delta; default: the user's login name."""
    tags: dict[str, str] = {}
    """Free tags on run and version."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use of the driver's machine."""
