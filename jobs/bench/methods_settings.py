"""What is compared: every method at a size of its own, with the learning rates that it is tried at."""

from dataclasses import dataclass
from typing import Any

from orchestrator.config import IA3, BitFit, Bottleneck, Full, LastLayers, Lora, Norms, Prefix, Prompt, Sparse

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    knobs: Any
    """Method and size."""
    lrs: tuple[float, ...]
    """Peak learning rates; the one with the best mean on the dev split counts."""
    peft: str | None = None
    """peft's own type, where it is run beside ours."""


SETTINGS: dict[str, Setting] = {
    "full": Setting(Full(), (5e-5, 1e-4, 3e-4)),
    "last_layers 2": Setting(LastLayers(layers=2), (1e-4, 3e-4, 1e-3)),
    "bitfit": Setting(BitFit(), (1e-3, 3e-3, 1e-2)),
    "sparse 1%": Setting(Sparse(density=0.01), (1e-3, 3e-3, 1e-2)),
    "norms": Setting(Norms(), (1e-3, 3e-3, 1e-2), peft="LN_TUNING"),
    "prompt 20": Setting(Prompt(tokens=20), (1e-2, 3e-2, 1e-1)),
    "prefix 20": Setting(Prefix(tokens=20), (1e-2, 3e-2, 1e-1)),
    "bottleneck houlsby 32": Setting(Bottleneck(size=32, placement="houlsby"), (5e-4, 1e-3, 3e-3)),
    "bottleneck pfeiffer 64": Setting(Bottleneck(size=64, placement="pfeiffer"), (5e-4, 1e-3, 3e-3)),
    "bottleneck parallel 64": Setting(Bottleneck(size=64, placement="parallel"), (5e-4, 1e-3, 3e-3)),
    "ia3": Setting(IA3(), (3e-3, 1e-2, 3e-2), peft="IA3"),
    "lora 4": Setting(Lora(rank=4, alpha=8), (5e-4, 1e-3, 3e-3)),
    "lora 16": Setting(Lora(rank=16, alpha=32), (5e-4, 1e-3, 3e-3), peft="LORA"),
    "lora+ 16": Setting(Lora(rank=16, alpha=32, lr_ratio=16), (3e-5, 1e-4, 3e-4)),
    "dora 16": Setting(Lora(rank=16, alpha=32, dora=True), (5e-4, 1e-3, 3e-3), peft="DORA"),
    "pissa 16": Setting(Lora(rank=16, alpha=16, start="pissa"), (2e-4, 5e-4, 1e-3)),
}


@dataclass(frozen=True)
class Trial:
    """One training."""

    setting: str
    lr: float
    seed: int

    @property
    def knobs(self) -> Any:
        """Method and size."""
        return SETTINGS[self.setting].knobs


def trials(names: list[str], seeds: tuple[int, ...]) -> list[Trial]:
    """Every setting at every learning rate and seed."""
    return [Trial(name, lr, seed) for name in names for lr in SETTINGS[name].lrs for seed in seeds]


def best_lr(lines: list[dict[str, Any]], setting: str) -> float:
    """The learning rate that the first seed was best with on the dev split."""
    mine = [v for v in lines if v["setting"] == setting and v["seed"] == SEEDS[0]]
    return float(max(mine, key=lambda v: v["dev"])["lr"])
