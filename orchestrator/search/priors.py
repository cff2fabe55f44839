"""What is searched of a method whose entry says nothing: ranges from published work, around the method's defaults.

- Learning rates: from what bases of billions of weights want (the methods' defaults lie there) up to what was best for
  an encoder of 22 million and the demo base (``jobs/bench/methods.md``). LoRA's best is about ten times that of full
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


LEARNING_RATES: dict[str, tuple[float, float]] = {
    "lora": (1e-4, 4e-3),
    "bottleneck": (3e-4, 6e-3),
    "prompt": (1e-2, 3e-1),
    "prefix": (2e-2, 4e-1),
    "ia3": (1e-3, 3e-2),
    "bitfit": (3e-4, 1e-2),
    "norms": (3e-4, 1e-2),
    "sparse": (3e-4, 2e-2),
    "last_layers": (3e-5, 1e-3),
    "full": (1e-5, 4e-4),
    "peft": (1e-4, 4e-3),
}
"""Method -> lowest and highest peak learning rate of AdamW."""
GRID_RATES = 3
"""Learning rates of a grid."""


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


def lr_prior(method: str, finite: bool) -> Range:
    """Learning rates of a method; for a grid the middles of equal parts on the logarithmic scale, to two digits."""
    low, high = LEARNING_RATES[method]
    if not finite:
        return Range("log", (low, high))
    shares = [(2 * i + 1) / (2 * GRID_RATES) for i in range(GRID_RATES)]
    return Range("choice", tuple(float(f"{low * (high / low) ** share:.1e}") for share in shares))


def alpha_of(rank: int, rslora: bool) -> float:
    """LoRA's alpha: the scale is 2 at every rank, or, where it grows with the rank's root, 2 at rank 16."""
    return 8.0 if rslora else 2.0 * rank
