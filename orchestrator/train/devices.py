"""GPUs that a plan can be made for, and how fast each does a rehearsed pass.

Rates are those of the vendor's data sheets (dense, 16-bit with fp32 sums). What share of them is reached was measured
on one H200 (jobs/bench/gpu.md and gpu_attempts.md: products at 715 to 750 of 989 TFLOP/s); on other GPUs the same share
is assumed, so their times are guesses, and said to be.
"""

import difflib
from collections import Counter
from dataclasses import dataclass

from orchestrator.errors import ConfigError
from orchestrator.train.meter import Work

GIB = 2**30
_PRODUCT_SHARE, _HALF = 0.74, 170
"""Share of the peak rate that large products reach, and the smallest dimension at which half of that is reached."""
_TRAFFIC_SHARE = 0.6
"""Share of the memory's bandwidth that kernels reach, all kinds together."""
_LAUNCH_S = (27e-6, 42e-6)
"""Seconds to launch a kernel out of Python, on a fast and on a slower host (29 and 40 were seen on one)."""
_REPLAY_S = 0.010
"""Seconds of a step's other work on the host where the pass is a CUDA graph."""
_SPREAD, _GUESSED = (0.93, 1.10), (0.75, 1.6)
"""How far a step's time may lie from the model's: on a GPU of the measured kind, and on another."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    name: str
    memory: int
    """Bytes that a process can get."""
    tflops: float
    """Of bf16 products."""
    bandwidth: float
    """Bytes per second."""
    measured: bool = False
    """Whether the model was checked on it."""

    @property
    def workspace(self) -> int:
        """Bytes that cuBLAS takes, for the forward and for the backward thread (its documentation's defaults)."""
        return (64 if self.tflops > 900 else 16) * 2**20


def _gpu(name: str, gib: float, tflops: float, gb_per_s: float, measured: bool = False) -> Gpu:
    return Gpu(name, round(gib * GIB), tflops, gb_per_s * 1e9, measured)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a10g", 22.1, 70, 600),
        _gpu("a100-40gb", 39.4, 312, 1555),
        _gpu("a100", 79.2, 312, 2039),
        _gpu("a6000", 47.4, 155, 768),
        _gpu("b200", 178.3, 2250, 8000),
        _gpu("h100", 79.1, 989, 3350),
        _gpu("h200", 139.8, 989, 4800, measured=True),
        _gpu("l4", 22.0, 121, 300),
        _gpu("l40s", 44.4, 362, 864),
        _gpu("rtx3090", 23.6, 71, 936),
        _gpu("rtx4090", 23.5, 165, 1008),
        _gpu("rtx5090", 31.3, 209, 1792),
    )
}
_ALIASES = {"4090": "rtx4090", "3090": "rtx3090", "5090": "rtx5090", "a100-80gb": "a100", "rtx-a6000": "a6000"}
_ALIASES |= {"a100-40g": "a100-40gb", "a100-80g": "a100"}  # as Ray calls them


def find_gpu(name: str) -> Gpu:
    """By its name, in any case, or by what the driver calls it (``NVIDIA H200``).

    Raises:
        ConfigError: it is none of the known ones.
    """
    short = name.lower().removeprefix("nvidia ").replace("geforce rtx ", "rtx").replace(" ", "-")
    short = _ALIASES.get(short, short)
    if found := GPUS.get(short) or GPUS.get(short.split("-")[0]):
        return found
    near = difflib.get_close_matches(short, GPUS, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"GPU {name!r} is not known{hint}; known: {', '.join(GPUS)}. Or give its --memory, such as 80GiB")


def pass_seconds(gpu: Gpu, work: Counter[Work]) -> float:
    """Seconds that the kernels of a pass take, each by what bounds it: products, or memory."""
    return sum(count * _kernel(gpu, one) for one, count in work.items())


def _kernel(gpu: Gpu, one: Work) -> float:
    moved = one.traffic / (gpu.bandwidth * _TRAFFIC_SHARE)
    if not one.flops:
        return moved
    share = _PRODUCT_SHARE * one.least / (one.least + _HALF)
    return max(moved, one.flops / (gpu.tflops * 1e12 * share))


def step_seconds(gpu: Gpu, work: Counter[Work], *, passes: int, graphed: bool) -> tuple[float, float]:
    """Range of a step's seconds: a pass takes as long as its kernels, or as launching them does.

    Args:
        gpu: which.
        work: of one pass.
        passes: of a step.
        graphed: whether a pass is one launch.
    """
    device, (low, high) = pass_seconds(gpu, work), _SPREAD if gpu.measured else _GUESSED
    launches = sum(work.values())
    if graphed:
        return passes * device * low + _REPLAY_S, passes * (device * high) + 2 * _REPLAY_S
    return passes * max(device * low, launches * _LAUNCH_S[0]), passes * max(device * high, launches * _LAUNCH_S[1])
