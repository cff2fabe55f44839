"""``Evaluation``: a delta, or the bare base, on a set of records."""

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.config.base import Base
from orchestrator.config.cluster import Tracking
from orchestrator.config.data import Source
from orchestrator.config.strict import Strict


class Evaluation(Strict):
    """What is evaluated, on what, and how."""

    delta: str
    """Registered name (``support``, ``support:7``, ``support@candidate``), a directory, or ``base``: the bare base."""
    data: Source
    """The records: prompts with ``completion`` or ``references`` (a list), conversations, or texts with labels."""
    base: Base = Base()
    """What is left out is as it was when the delta was trained."""
    metrics: tuple[str, ...] = ()
    """Metrics; default: all that fit the delta's task and the set."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many records."""
    max_tokens: int = Field(default=128, ge=1)
    """Most tokens of an answer."""
    length: int = Field(default=1024, ge=16)
    """Most tokens of prompt + answer, or of a text; longer references and texts are cut."""
    rows: int = Field(default=16, ge=1)
    """Answers generated at once."""
    chat: Literal["auto", "never"] = "auto"
    """Render prompts through the base's chat template, where it has one, or never."""
    tracking: Tracking = Tracking()
    """Where the results go."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(value.get("metrics"), str):
            return {**value, "metrics": [value["metrics"]]}
        return value
