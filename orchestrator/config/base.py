"""The frozen base model."""

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.config.strict import Strict


class Base(Strict):
    """Which model is the base, and in what form it is held."""

    id: str = "demo"
    """Hub name, local directory, or ``demo`` for the small base in the package."""
    revision: str | None = None
    """Hub branch, tag or commit; a local directory takes none."""
    quantize: Literal["none", "int8", "nf4"] = "nf4"
    """How the linear weights are held: as they are, 8 bits per row, or 4-bit NormalFloat (double-quantized)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; ``auto`` is bf16 on a GPU and fp32 on a CPU (whose bf16 backward is about 20x slower)."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of transformers; ``auto`` is sdpa."""
    kernels: Literal["auto", "none", "liger"] = "auto"
    """Fused kernels; ``auto`` takes Liger on a GPU where it is installed."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Only for models you trust."""
    random_init: int | None = None
    """Seed: make random weights from the model's config instead of reading any (benchmarks)."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return {"id": value} if isinstance(value, str) else value


class Identity(Strict):
    """Who a base is, apart from how it is held. The same on every rank and machine."""

    id: str
    """Name it was loaded by; informative."""
    revision: str | None = None
    """Commit it was loaded at, where known."""
    source_hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 over names, dtypes, shapes and bytes of the source weights. Must match for a delta to fit."""
    recipe: str
    """Quantization and compute recipe, such as ``nf4-double/bf16``. May differ, with a warning."""
    template_hash: str | None = None
    """sha256 of the chat template."""
    licence: str | None = None
    """Licence named in the model card."""
