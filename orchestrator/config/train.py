"""How the delta is trained."""

from typing import Literal

from pydantic import Field

from orchestrator.config.strict import Strict

HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "mcc"})
"""Metrics of which more is better; of all others less is."""


class Train(Strict):
    """Optimizer, schedule, evaluation, checkpoints."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; overrides ``epochs``."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training samples."""
    batch_size: int = Field(default=16, ge=1)
    """Samples per step over all workers (the global batch), whatever their number."""
    rows_per_pass: int = Field(default=4, ge=1)
    """Packed rows per forward pass of one worker; the rest of a batch is accumulated."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate (AdamW); default: the method's own."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps that warm up."""
    min_lr: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first decay."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's second decay."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm; 0 turns clipping off."""
    recompute: bool = False
    """Recompute activations in the backward pass (gradient checkpointing)."""
    init_from: str | None = None
    """Continue from a delta: a directory (ours or peft's), or a registered name such as ``support@champion``."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; default: ten times in a run, and at its end."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; default: ten times in a run, and at its end."""
    keep: int = Field(default=2, ge=1)
    """Last checkpoints to keep. The best delta is kept apart."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without improvement."""
    metric: Literal["eval_loss", "loss", "accuracy", "f1", "mcc"] = "eval_loss"
    """What picks the best delta; of a classification also accuracy, macro F1 or Matthews correlation of the held-out
    set. Without a held-out set the last one is kept."""
    log_every: int = Field(default=1, ge=1)
    """Steps between reports."""
    seed: int = Field(default=0, ge=0)
    """Seed of data order, start values and dropout."""
