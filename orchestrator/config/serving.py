"""``Serving``: one endpoint: a base, the deltas to hold, and its limits."""

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.config.base import Base
from orchestrator.config.cluster import Tracking
from orchestrator.config.strict import Strict


class Serving(Strict):
    """An OpenAI-compatible endpoint over one base and many deltas."""

    name: str = Field(default="manta", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Ray Serve application name."""
    base: Base = Base()
    """The base; deltas of other source weights are refused."""
    deltas: tuple[str, ...] = ()
    """Registered names (``support``, ``support:7``, ``support@candidate``) or directories; first one first."""
    served_name: str | None = None
    """Model id of the bare base; default: ``base.id``."""
    host: str = "127.0.0.1"
    """Address to listen on. Put a gateway with authentication before it if it is not loopback."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port of the HTTP proxy."""
    rows: int = Field(default=16, ge=1)
    """Requests decoded at once."""
    length: int = Field(default=1024, ge=16)
    """Most tokens of prompt + answer of one request."""
    max_queued: int = Field(default=256, ge=0)
    """Requests that may wait before 503."""
    prefill_chunk: int = Field(default=256, ge=16)
    """Prompt tokens of one request that are read between two decode steps."""
    refresh_s: float = Field(default=5.0, gt=0)
    """Seconds between looks at the registry for moved aliases."""
    gpus: Literal["auto", 0, 1] = "auto"
    """GPUs of the replica; ``auto``: one where the cluster has any."""
    tracking: Tracking = Tracking()
    """Where the registry is."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(value.get("deltas"), str):
            return {**value, "deltas": [value["deltas"]]}
        return value
