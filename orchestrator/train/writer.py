"""Writes the delta of a run with its lineage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from orchestrator.config import Identity, Method, Run, Task
from orchestrator.data import Prepared
from orchestrator.delta import Delta, new_manifest, save_delta
from orchestrator.methods import Bank, Scope, to_files


@dataclass(frozen=True)
class DeltaWriter:
    """What all deltas of a run have in common."""

    run: Run
    identity: Identity
    scope: Scope
    sites: list[str]
    knobs: Method
    task: Task
    parameters: int
    data_digest: str
    parent: str | None

    @classmethod
    def of(
        cls,
        run: Run,
        identity: Identity,
        bank: Bank,
        slot: int,
        knobs: Method,
        data: Prepared,
        parent: Delta | None = None,
    ) -> "DeltaWriter":
        """Of a slot that has been filled."""
        return cls(
            run=run.model_copy(update={"task": data.task}),
            identity=identity,
            scope=bank.scope,
            sites=bank.sites(slot),
            knobs=knobs,
            task=data.task,
            parameters=sum(p.numel() for p in bank.parameters(slot).values()),
            data_digest=data.digest,
            parent=parent.sha256 if parent else None,
        )

    @property
    def name(self) -> str:
        """The delta's name."""
        return self.run.name

    def write(self, folder: Path, tensors: Mapping[str, Tensor], metrics: Mapping[str, float]) -> None:
        """A delta folder."""
        manifest = new_manifest(
            name=self.run.name,
            base=self.identity,
            method=self.knobs,
            task=self.task,
            parameters=self.parameters,
            data_digest=self.data_digest,
            metrics={k: v for k, v in metrics.items() if v == v and abs(v) != float("inf")},
            parent=self.parent,
            owner=self.run.tracking.owner,
            tags=self.run.tracking.tags,
            run=self._config(),
        )
        files, config = to_files(self.knobs, self.task, tensors, self.sites, self.scope)
        save_delta(folder, files, manifest, config)

    def _config(self) -> dict[str, Any]:
        return self.run.model_dump(mode="json", exclude={"tracking"})
