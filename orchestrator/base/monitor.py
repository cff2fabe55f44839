"""Watch whether gathered weights are let go: what is still alive after a forward pass un-shards the base."""

import gc
import weakref
from typing import Any

from torch import nn


class GatherWatch:
    """Weak references to the storage of every sharded weight that a forward pass gathers.

    Make it after DeepSpeed's own hooks are in place: it looks right before a module computes, when its weights are
    whole. Weights under the persistence threshold are whole at all times and are not watched; nor is a "gathered"
    weight that is the shard itself, as on a single rank.

    Args:
        model: what is called; its modules with sharded weights of their own are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gathered_bytes = 0
        """Bytes gathered so far, each gather counted."""
        self._seen: list[tuple[weakref.ref[Any], int]] = []
        self._hooks = [
            module.register_forward_pre_hook(self._look)
            for module in model.modules()
            if any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))
        ]

    def alive_bytes(self) -> int:
        """Bytes of gathered storages that something still holds."""
        gc.collect()
        self._seen = [(ref, size) for ref, size in self._seen if ref() is not None]
        return sum({id(ref()): size for ref, size in self._seen}.values())

    def reset(self) -> None:
        """Forget what was seen."""
        self.gathered_bytes = 0
        self._seen.clear()

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self.reset()

    def __enter__(self) -> "GatherWatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self, module: nn.Module, args: Any) -> None:
        parameter: Any  # DeepSpeed's attributes are on it
        for parameter in module.parameters(recurse=False):
            if not hasattr(parameter, "ds_id") or parameter.ds_persist:
                continue
            storage = parameter.data.untyped_storage()
            if storage.data_ptr() == parameter.ds_tensor.untyped_storage().data_ptr():
                continue
            self.gathered_bytes += storage.nbytes()
            self._seen.append((weakref.ref(storage), storage.nbytes()))
