"""Bytes of this process and of a model, as zero_memory.py counts them."""

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Peak:
    """Highest resident memory since it was made, above what was resident then.

    In all it is the kernel's own mark; of the anonymous part (mapped files left out) there is none, so it is sampled.
    """

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self.start, self._anonymous = status("VmRSS"), status("RssAnon")
        self._highest = self._anonymous
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self._highest = max(self._highest, status("RssAnon"))
            time.sleep(0.005)

    def bytes(self) -> int:
        return status("VmHWM") - self.start

    def anonymous(self) -> int:
        return self._highest - self._anonymous


def status(key: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":")]
    return int(line.split()[1]) * 1024


def storage_bytes(model: Any, states: list[Any], skip: str = "\n") -> int:
    """Bytes of every storage that a model's parameters (or this rank's shards of them), buffers and states hold."""
    tensors = [*state_tensors(states), *model.buffers()]
    for name, parameter in model.named_parameters():
        if skip not in name:
            tensors += [parameter.data, *([parameter.ds_tensor.data] if hasattr(parameter, "ds_tensor") else [])]
    return distinct_bytes(tensors)


def state_tensors(states: list[Any]) -> Iterator[Any]:
    for state in states:
        yield from (state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code)


def distinct_bytes(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def weights(module: Any) -> int:
    """Weights of a module itself, 4-bit ones counted as weights."""
    if hasattr(module, "in_features"):
        return int(module.in_features * module.out_features)
    return sum(elements(p) for p in module.parameters(recurse=False))


def elements(parameter: Any) -> int:
    return int(parameter.ds_numel)  # of the whole tensor
