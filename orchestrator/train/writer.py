"""Writes the delta of a run with its lineage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from orchestrator.config import Identity, Method, Run
from orchestrator.delta import new_manifest, save_delta
from orchestrator.methods import METHODS, Scope


@dataclass(frozen=True)
class DeltaWriter:
    """What all deltas of a run have in common."""

    run: Run
    identity: Identity
    scope: Scope
    sites: list[str]
    knobs: Method
    data_digest: str
    parent: str | None

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
            task=self.run.task.type,
            data_digest=self.data_digest,
            metrics={k: v for k, v in metrics.items() if v == v and abs(v) != float("inf")},
            parent=self.parent,
            owner=self.run.tracking.owner,
            tags=self.run.tracking.tags,
            run=self._config(),
        )
        save_delta(folder, tensors, manifest, METHODS[self.knobs.type].to_peft(self.knobs, self.sites, self.scope))

    def _config(self) -> dict[str, Any]:
        return self.run.model_dump(mode="json", exclude={"tracking"})
