"""What is learnt; ``Task`` is a union, told apart by ``type``."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from orchestrator.config.strict import Strict

MOST_LABELS = 10_000
"""Labels that a head has at most; more are hardly classes."""


class CausalLM(Strict):
    """Next-token prediction on the trained tokens."""

    type: Literal["causal_lm"] = "causal_lm"
    """Task name."""


class Classification(Strict):
    """One of several labels for each text, by a head of the delta's own."""

    type: Literal["classification"] = "classification"
    """Task name."""
    labels: tuple[str, ...] | None = None
    """The labels in the order of the head's outputs; default: those of the training records, sorted."""
    pooling: Literal["auto", "last", "mean", "first", "pooler"] = "auto"
    """What of the hidden states the head sees: the last token's, their mean, the first token's, or that of the base's
    own pooler; ``auto``: the last of a decoder, the mean of an encoder."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on what the head sees."""


def _short(value: object) -> object:
    """``classification`` is ``{type: classification}``; without a type it is next-token prediction."""
    if isinstance(value, str):
        return {"type": value}
    return {"type": "causal_lm", **value} if isinstance(value, dict) else value


Task = Annotated[CausalLM | Classification, Field(discriminator="type"), BeforeValidator(_short)]
"""One task and its knobs."""
