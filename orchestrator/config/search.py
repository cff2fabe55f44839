"""``Search``: which deltas are tried, how they are chosen, stopped and judged."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, FieldSerializationInfo, field_serializer, model_validator

from orchestrator.config.base import Base
from orchestrator.config.cluster import Cluster, Tracking
from orchestrator.config.data import Data
from orchestrator.config.ranges import is_range
from orchestrator.config.run import NAME_PATTERN
from orchestrator.config.strict import Strict
from orchestrator.config.task import CausalLM, Task
from orchestrator.config.train import Train

HELD_OUT = frozenset({"eval_loss", "accuracy", "f1", "mcc"})
"""Metrics of the held-out set."""


class Budget(Strict):
    """When a search ends: at the first of these."""

    trials: int | None = Field(default=24, ge=1)
    """Trials to start; null for no limit."""
    tokens: int | None = Field(default=None, ge=1)
    """Training tokens of all trials together."""
    hours: float | None = Field(default=None, gt=0)
    """Wall-clock time."""


class Scheduler(Strict):
    """What stops a trial that falls behind. Trials are compared after the same share of their own length."""

    type: Literal["asha", "median", "none"] = "asha"
    """Successive halving (Li et al. 2018, arXiv:1810.05934), the median rule (Golovin et al. 2017), or nothing."""
    grace: int = Field(default=1, ge=1)
    """Evaluations that every trial gets."""
    reduction: int = Field(default=3, ge=2)
    """Of as many trials one goes on at each rung (asha)."""


class Sampler(Strict):
    """What proposes the next trial."""

    type: Literal["tpe", "random", "grid"] = "tpe"
    """Tree-structured Parzen estimator (Bergstra et al. 2011), uniform draws, or every point of a finite space."""
    startup: int = Field(default=10, ge=1)
    """Random trials before the estimator (tpe)."""


class Objective(Strict):
    """One thing to be good at."""

    metric: Literal["eval_loss", "loss", "accuracy", "f1", "mcc", "parameters", "memory", "latency"]
    """A metric of the held-out set, the training loss, the trained parameters, bytes that a trial adds in training, or
    seconds that it adds to a forward pass."""


class Packs(Strict):
    """How trials share bases."""

    slots: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Trials that train at once on one base; ``auto``: as many as the planner finds room for."""
    count: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Bases; ``auto``: as many as the cluster's GPUs hold, one on CPUs."""


class Search(Strict):
    """Many deltas on one base, the best of them kept."""

    name: str = Field(default="search", pattern=NAME_PATTERN)
    """Name of the search and of the delta that wins."""
    base: Base = Base()
    """The frozen base."""
    data: Data = Data(eval_fraction=0.05)
    """The records; metrics of a held-out set need ``eval`` or ``eval_fraction``."""
    task: Task = CausalLM()
    """What is learnt."""
    train: Train = Train()
    """What all trials have in common; ``lr`` or ``batch_size`` given here is fixed, left out it is searched."""
    methods: tuple[dict[str, Any], ...] = Field(default=({"type": "lora"},), min_length=1)
    """Methods, each with its knobs: a value fixes one; ``{choice: [...]}``, ``{log: [low, high]}``, ``{uniform: ...}``,
    ``{int: ...}`` or ``{log_int: ...}`` searches it; left out, it has its prior or its default. ``train.lr`` may
    stand among them."""
    space: dict[str, Any] = {}
    """Further keys of a run to search, such as ``data.length: {choice: [256, 512]}``."""
    sampler: Sampler = Sampler()
    """What proposes trials."""
    scheduler: Scheduler = Scheduler()
    """What stops them early."""
    budget: Budget = Budget()
    """When the search ends."""
    objective: tuple[Objective, ...] = Field(default=(Objective(metric="eval_loss"),), min_length=1)
    """What counts; several give a Pareto front, and the first one picks the winner."""
    packs: Packs = Packs()
    """How trials share bases."""
    seed: int = Field(default=0, ge=0)
    """Of the sampler; of each trial's training it is ``train.seed``."""
    cluster: Cluster = Cluster()
    """Workers of a pack, ZeRO, storage."""
    tracking: Tracking = Tracking()
    """MLflow."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        """Short forms: method names, ``sampler: random``, ``objective: accuracy``, ``budget: 24``; dotted keys."""
        if not isinstance(value, dict):
            return value
        value = dict(value)
        methods = value.get("methods")
        if isinstance(methods, str | dict):
            methods = [methods]
        if isinstance(methods, list | tuple):
            value["methods"] = [_method(m) for m in methods]
        if isinstance(space := value.get("space"), dict):
            value["space"] = _nested(space)
        for key in ("sampler", "scheduler", "task"):
            if isinstance(value.get(key), str):
                value[key] = {"type": value[key]}
        objective = value.get("objective")
        if isinstance(objective, str | dict):
            objective = [objective]
        if isinstance(objective, list | tuple):
            value["objective"] = [{"metric": o} if isinstance(o, str) else o for o in objective]
        if isinstance(budget := value.get("budget"), int) and not isinstance(budget, bool):
            value["budget"] = {"trials": budget}
        if "shard" in value:
            cluster = dict(value.get("cluster") or {})
            cluster["zero"] = {**(cluster.get("zero") or {}), "stage": value.pop("shard")}
            value["cluster"] = cluster
        return value

    @field_serializer("data", "train")
    def _as_given(self, part: Data | Train, info: FieldSerializationInfo) -> dict[str, Any]:
        """Without defaults: what is given is fixed and the rest may be searched, after a round trip too."""
        return part.model_dump(mode=info.mode, exclude_unset=True)

    def common(self) -> dict[str, Any]:
        """What every trial's run has, as plain values; the method is missing."""
        parts = (self.base, self.data, self.task, self.train, self.cluster, self.tracking)
        names = ("base", "data", "task", "train", "cluster", "tracking")
        return {"name": self.name} | {name: part.model_dump() for name, part in zip(names, parts, strict=True)}


def _method(entry: object) -> object:
    """``lora`` is ``{type: lora}``; as in a run, knobs without a type are LoRA's or peft's."""
    if isinstance(entry, str):
        return {"type": entry}
    if not isinstance(entry, dict):
        return entry
    kind = {} if "type" in entry else {"type": "peft" if "peft" in entry else "lora"}
    return kind | _nested(entry)


def _nested(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Dotted keys written out: ``train.lr`` is ``lr`` below ``train``. One that is there already stays dotted."""
    out: dict[str, Any] = {}
    for key, value in sorted(values.items(), key=lambda item: "." in str(item[0])):
        *above, last = str(key).split(".")
        here: Any = out
        for name in above:
            here = here.setdefault(name, {}) if isinstance(here, dict) and not is_range(here) else None
        if not isinstance(here, dict) or is_range(here) or last in here:
            out[str(key)] = value
        else:
            here[last] = dict(value) if isinstance(value, dict) else value
    return out
