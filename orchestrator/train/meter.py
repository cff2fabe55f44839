"""Counts what operators on the meta device would take: memory while storages live, and work, for a device to price.

Shapes: an operator's output has M x N entries of a product over K.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}
"""Products of matrices, and where among their arguments the first matrix is."""
_MADE = {_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default}
"""What stands for a fused kernel's output, which is read and written about as often as that of any other."""


@dataclass(frozen=True)
class Work:
    """One kernel's work."""

    flops: float
    """Of a product of matrices; 0 of anything else."""
    traffic: int
    """Bytes read and written."""
    least: int
    """The smallest of M, N and K: short products keep fewer of a GPU's units busy."""


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every operator on meta tensors is counted.

    Args:
        free: tensors that are there anyway, and count for nothing.
    """

    def __init__(self, free: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.work: Counter[Work] = Counter()
        self._seen: dict[int, Any] = {}
        for tensor in free:
            storage = tensor.untyped_storage()
            self._seen[id(storage)] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator on shapes, and count it."""
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_meta]
        new = [self._see(t.untyped_storage()) for t in made]
        if any(new) or (made and func._schema.is_mutable):
            self.work[_work(func, args, made)] += 1
        return out

    def _see(self, storage: Any) -> bool:
        """Whether a storage is a new one; then it counts until it is freed."""
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return False

        def gone(_: object) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
        return True


def size_of(tensor: Tensor) -> int:
    """Bytes of all entries."""
    return tensor.numel() * tensor.element_size()


def _work(func: Any, args: Any, made: list[Tensor]) -> Work:
    out = sum(map(size_of, made))
    if func in _MADE:
        return Work(0.0, 2 * out, 0)
    traffic = out + sum(size_of(t) for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_meta)
    if (first := _PRODUCTS.get(func)) is None:
        return Work(0.0, traffic, 0)
    common, (rows, columns) = args[first].shape[-1], made[0].shape[-2:]
    return Work(2.0 * made[0].numel() * common, traffic, min(common, rows, columns))


def attention_work(rows: int, heads: int, queries: int, keys: int, size: int, itemsize: int, causal: bool) -> Work:
    """The forward pass of a fused attention kernel: two products of scores and values, half of them where it looks
    back only; reads and writes no score."""
    flops = 4.0 * rows * heads * queries * keys * size / (2 if causal else 1)
    return Work(flops, 4 * rows * heads * max(queries, keys) * size * itemsize, size)


def total_flops(work: Counter[Work]) -> float:
    """Of all products."""
    return math.fsum(one.flops * count for one, count in work.items())
