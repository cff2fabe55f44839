"""What is learnt."""

from typing import Literal

from orchestrator.config.strict import Strict


class CausalLM(Strict):
    """Next-token prediction on the trained tokens."""

    type: Literal["causal_lm"] = "causal_lm"
    """Task name."""


Task = CausalLM
