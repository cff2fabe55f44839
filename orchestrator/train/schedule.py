"""Learning rate over a run."""

import math

from orchestrator.config import Train


def lr_at(train: Train, step: int, total: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``total``: linear warm-up, then decay to ``min_lr`` of the peak."""
    assert train.lr is not None, "the method's own is filled in before a trial is made"
    warm = round(train.warmup * total)
    if step < warm:
        return train.lr * (step + 1) / warm
    if train.schedule == "constant":
        return train.lr
    done = min(1.0, (step - warm) / max(1, total - warm))
    left = (1 + math.cos(math.pi * done)) / 2 if train.schedule == "cosine" else 1 - done
    return train.lr * (train.min_lr + (1 - train.min_lr) * left)
