"""What is searched of a method whose entry says nothing: ranges from published work, around the method's defaults.

- Learning rates: a factor of 5 either way of the method's own default. LoRA's best is about ten times that of full
  fine-tuning and moves by less than 2 from rank 4 to 512 (Schulman et al. 2025, "LoRA Without Regret"), so one range
  serves every rank.
- Batch sizes: small ones; large ones cost LoRA more than they cost full fine-tuning (the same).
- LoRA: ranks 4 to 64, alpha = 2 r (Biderman et al. 2024, arXiv:2405.09673).
- Bottleneck: sizes around those of Houlsby et al. 2019, arXiv:1902.00751; placements as He et al. 2021,
  arXiv:2110.04366, compare them.
- Virtual tokens: Lester et al. 2021, arXiv:2104.08691 (more than 20 gain little).
- Densities: a decade either way of the 0.5 % of Guo et al. 2020, arXiv:2012.07463.
- Layers: few of the last ones, Lee et al. 2019, arXiv:1911.03090.

A method that is not named here has no knob worth a trial beside its learning rate.
"""

from dataclasses import dataclass
from typing import Any

from orchestrator.config.ranges import Range

LR_FACTOR = 5.0
"""Learning rates reach from the default over this to the default times it."""
LR_GRID_FACTOR = 3.0
"""The same of a grid's three learning rates."""
BATCH_SIZES = (4, 8, 16)
"""Samples per step."""
MOST_OF_LENGTH = 0.25
"""Share of a row that virtual tokens may take."""


@dataclass(frozen=True)
class Prior:
    """What a knob is drawn from; ``grid`` instead where points are counted."""

    range: Range
    grid: Range | None = None


def _choice(*values: Any) -> Prior:
    return Prior(Range("choice", values))


PRIORS: dict[str, dict[str, Prior]] = {
    "lora": {"rank": _choice(4, 8, 16, 32, 64)},
    "bottleneck": {"size": _choice(16, 32, 64, 128), "placement": _choice("pfeiffer", "houlsby", "parallel")},
    "prompt": {"tokens": _choice(10, 20, 50)},
    "prefix": {"tokens": _choice(10, 20, 50)},
    "sparse": {"density": Prior(Range("log", (0.0005, 0.05)), Range("choice", (0.0005, 0.005, 0.05)))},
    "last_layers": {"layers": _choice(1, 2, 4)},
}
"""Method -> knob -> prior."""


def knob_priors(method: str, length: int, finite: bool) -> dict[str, Range]:
    """Ranges of a method's knobs, at rows of ``length`` tokens; ``finite`` ones for a grid."""
    out = {}
    for knob, prior in PRIORS.get(method, {}).items():
        span = prior.grid if finite and prior.grid is not None else prior.range
        if knob == "tokens":
            fitting = tuple(n for n in span.values if n <= MOST_OF_LENGTH * length)
            span = Range("choice", fitting or span.values[:1])
        out[knob] = span
    return out


def lr_prior(default: float, finite: bool) -> Range:
    """Learning rates around a method's default."""
    if finite:
        return Range("choice", (default / LR_GRID_FACTOR, default, default * LR_GRID_FACTOR))
    return Range("log", (default / LR_FACTOR, default * LR_FACTOR))


def alpha_of(rank: int, rslora: bool) -> float:
    """LoRA's alpha: the scale is 2 at every rank, or, where it grows with the rank's root, 2 at rank 16."""
    return 8.0 if rslora else 2.0 * rank
