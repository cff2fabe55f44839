"""The only place that knows DeepSpeed: it shards the frozen base, and only the base.

The bank's tensors stay outside, replicated, with a gradient sum of our own; stages 1 and 2 share out its optimizer
and gradients by tensor. DeepSpeed is started without an optimizer (it has one clip norm and one overflow flag for
all, so it could not keep trials apart).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.base.model import decoder_layers
from orchestrator.config import Zero
from orchestrator.errors import TrainError
from orchestrator.train.zero import deepspeed_config

T = TypeVar("T")


class Engine:
    """Ranks, their sums, and the sharded base."""

    def __init__(
        self, zero: Zero, *, stage: int, device: torch.device, dtype: torch.dtype, rows_per_pass: int = 1
    ) -> None:
        self.stage = stage
        self.device = device
        self.dtype = dtype
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.config = deepspeed_config(zero, rows_per_pass=rows_per_pass, cpu=device.type == "cpu")
        self._engine: Any = None
        if stage == 3:
            self._deepspeed = _import_deepspeed()
            self._deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl")

    @property
    def sharder(self) -> Any:
        """What ``load_base`` hands each layer to; None where the base is replicated."""
        return self.shard if self.stage == 3 else None

    def shard(self, module: nn.Module) -> None:
        """Keep this rank's share of the module's parameters."""
        self._deepspeed.zero.Init(module=module, config_dict_or_path=self.config, dtype=self.dtype)

    def start(self, model: Any) -> Any:
        """The model to call, with DeepSpeed's gathering hooks where it is sharded; the same one when called again."""
        if self.stage != 3:
            return model
        if self._engine is not None:
            return self._engine.module
        _, layers = decoder_layers(model)
        self._deepspeed.utils.set_z3_leaf_modules(model, sorted({type(m) for m in layers}, key=str))
        self._engine, *_ = self._deepspeed.initialize(model=model, config=self.config)
        return self._engine.module

    @contextmanager
    def alike(self, model: Any) -> Iterator[None]:
        """Inside, every rank's backward pass goes down to the embeddings, whatever its rows' slots train.

        A sharded layer is gathered by all ranks at once: one whose rows train only the last layers would leave the
        others waiting.
        """
        if self.stage != 3 or self.ranks == 1:
            yield
            return
        words: nn.Module = model.get_input_embeddings()
        handle = words.register_forward_hook(lambda _, __, out: out.requires_grad_())
        try:
            yield
        finally:
            handle.remove()

    def forget_order(self) -> None:
        """Slots came or went: DeepSpeed is not to expect the order in which it met the layers so far.

        It notices most changes by itself, but not that the backward pass now goes on to the embeddings.
        """
        if self._engine is not None:
            coordinator = self._engine.optimizer.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def close(self) -> None:
        """Undo DeepSpeed's hooks."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(value)
        return value

    def owner(self, index: int) -> int:
        """The rank that optimizes the bank's ``index``-th tensor (stages 1 and 2)."""
        return index % self.ranks

    def owns(self, index: int) -> bool:
        """Whether this rank optimizes it; every rank does at stages 0 and 3."""
        return self.stage in (0, 3) or self.owner(index) == self.rank

    def sum_gradients(self, leaves: Mapping[str, Tensor]) -> None:
        """Sum the leaves' gradients over ranks; at stage 2 each only on its owner."""
        for leaf in leaves.values():
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        if self.ranks == 1:
            return
        grads = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
        if self.stage == 2:
            for rank in range(self.ranks):
                _flat(grads[rank :: self.ranks], lambda flat, rank=rank: dist.reduce(flat, rank))
        else:
            _flat(grads, dist.all_reduce)

    def broadcast(self, values: Sequence[Tensor], rank: int) -> None:
        """Copy the values from one rank to every other."""
        if self.ranks > 1:
            for dtype in dict.fromkeys(v.dtype for v in values):  # a float could not hold every index
                _flat([v for v in values if v.dtype == dtype], lambda flat: dist.broadcast(flat, rank))

    def most(self, code: int) -> int:
        """The largest of the ranks' codes."""
        if self.ranks == 1:
            return code
        value = torch.tensor([code], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value.item())

    def agree(self, do: Callable[[], T]) -> T:
        """Do it on every rank; where it fails on one, it fails on all.

        Raises:
            TrainError: it failed on another rank; here what it failed with.
        """
        failure: Exception | None = None
        try:
            made = do()
        except Exception as e:
            failure = e
        if self.most(int(failure is not None)):
            raise failure or TrainError("another worker failed at this; its log says why")
        return made

    def share(self, text: str | None) -> str | None:
        """The first rank's text, on every rank; of none only that there is none."""
        if self.ranks == 1:
            return text
        said = b"" if text is None else text.encode()
        length = self.most(len(said))
        if not length:
            return None
        value = torch.zeros(length, dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            value.copy_(torch.frombuffer(bytearray(said), dtype=torch.uint8))
        dist.broadcast(value, 0)
        return bytes(value.tolist()).decode()

    def same(self, what: str, digest: str) -> None:
        """Refuse ranks that read different things.

        Raises:
            TrainError: this rank's digest is not that of all.
        """
        if self.ranks == 1:
            return
        value = int(digest[:15], 16)
        both = torch.tensor([value, -value], device=self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        if int(both[0]) != -int(both[1]):
            raise TrainError(
                f"the workers read different {what}: {digest[:12]} here. Put one copy where every node finds it, and "
                "pin base.revision"
            )

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.ranks > 1:
            dist.barrier()


def least(*values: int, device: torch.device) -> tuple[int, ...]:
    """The smallest of each value over all ranks, so that they decide alike."""
    if not dist.is_initialized():
        return values
    both = torch.tensor(values, device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MIN)
    return tuple(int(v) for v in both)


def _flat(values: list[Tensor], collective: Any) -> None:
    """One collective for many tensors, or one for each of their dtypes: no index is rounded to a float."""
    for dtype in dict.fromkeys(v.dtype for v in values):
        same = [v for v in values if v.dtype == dtype]
        flat = torch.cat([v.reshape(-1) for v in same])
        collective(flat)
        at = 0
        for value in same:
            value.copy_(flat[at : at + value.numel()].view_as(value))
            at += value.numel()


def _import_deepspeed() -> Any:
    # Its start-up report and one line per parameter group would bury the run's own.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as e:
        raise TrainError(f"stage 3 needs deepspeed, which does not import: {e}") from e
    # Its all-reduce through shared memory would be compiled at the first run, for a minute, and is never called here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed
