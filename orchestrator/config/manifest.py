"""``Manifest``: what a delta says of itself; ``manta.json`` beside its tensors."""

from typing import Any

from pydantic import Field

from orchestrator.config.base import Identity
from orchestrator.config.method import Method
from orchestrator.config.run import NAME_PATTERN
from orchestrator.config.strict import Strict
from orchestrator.config.task import CausalLM, Task


class Manifest(Strict):
    """Lineage of one delta."""

    schema_version: int = Field(default=1, ge=1, le=1)
    """Layout of this record."""
    name: str = Field(pattern=NAME_PATTERN)
    """Delta name."""
    base: Identity
    """The base it was trained on."""
    method: Method
    """Method and knobs."""
    task: Task = CausalLM()
    """What was learnt; of a classification, the labels in the order of the head's outputs."""
    data_digest: str | None = None
    """sha256 of the training samples."""
    metrics: dict[str, float] = {}
    """Final and best metrics."""
    parent: str | None = None
    """sha256 of the delta it continued from."""
    versions: dict[str, str] = {}
    """Versions of this project and of the libraries it used."""
    code: str | None = None
    """Commit of the project's checkout, where known."""
    owner: str | None = None
    """Who made it."""
    tags: dict[str, str] = {}
    """Free tags."""
    parameters: int = Field(ge=0)
    """Trained parameters."""
    created: str
    """UTC time, ISO 8601."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of ``adapter_model.safetensors``."""
    run: dict[str, Any] = {}
    """The run's config, resolved."""
