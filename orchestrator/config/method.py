"""The torch-free knobs of each method; ``Method`` is their union, told apart by ``type``."""

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.config.strict import Strict


class Lora(Strict):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    """Method name."""
    rank: int = Field(default=16, ge=1, le=4096)
    """Rank r of the update B A."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: alpha / r, or alpha / sqrt(r) with ``rslora``."""
    rslora: bool = False
    """Rank-stabilized scale (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of A."""
    targets: tuple[str, ...] = ("all-linear",)
    """Layers: ``all-linear``, names such as ``q_proj``, or regular expressions over full names."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(value.get("targets"), str):
            return {**value, "targets": [value["targets"]]}
        return value

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


Method = Lora
