"""``Run``: everything about one training run, in one frozen record."""

from pydantic import Field, model_validator

from orchestrator.config.base import Base
from orchestrator.config.cluster import Cluster, Tracking
from orchestrator.config.data import Data
from orchestrator.config.method import Lora, Method
from orchestrator.config.strict import Strict
from orchestrator.config.task import CausalLM, Task
from orchestrator.config.train import Train

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class Run(Strict):
    """One delta: base, data, method, training, place."""

    name: str = Field(default="delta", pattern=NAME_PATTERN)
    """Name of the run and of the delta."""
    base: Base = Base()
    """The frozen base."""
    data: Data = Data()
    """The records."""
    method: Method = Lora()
    """The method and its knobs."""
    task: Task = CausalLM()
    """What is learnt."""
    train: Train = Train()
    """Optimizer, schedule, evaluation, checkpoints."""
    cluster: Cluster = Cluster()
    """Workers, ZeRO, storage."""
    tracking: Tracking = Tracking()
    """MLflow."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """``method: bitfit`` and ``task: classification`` are short for their ``type``."""
        if not isinstance(value, dict):
            return value
        return {k: {"type": v} if k in ("method", "task") and isinstance(v, str) else v for k, v in value.items()}

    @model_validator(mode="before")
    @classmethod
    def _shard(cls, value: object) -> object:
        """``shard: auto|0..3`` is short for ``cluster.zero.stage``."""
        if isinstance(value, dict) and "shard" in value:
            value = dict(value)
            cluster = dict(value.get("cluster") or {})
            cluster["zero"] = {**(cluster.get("zero") or {}), "stage": value.pop("shard")}
            value["cluster"] = cluster
        return value

    @property
    def lr(self) -> float:
        """The peak learning rate in force."""
        return self.train.lr if self.train.lr is not None else self.method.default_lr
