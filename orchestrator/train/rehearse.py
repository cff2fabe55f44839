"""A training pass on shapes alone: the run's own code on the meta device, and a meter of the memory that it would take.

What autograd keeps, what a recomputation makes again, what is in passing while gradients are made: all of it is asked
of the code that runs, so a new method or architecture needs no formula here. Written down are only kernels that cannot
run on shapes: attention (Dao 2023, arXiv:2307.08691: keeps queries, keys, values, output, and a number for each query)
and those of ``base/empty.py``.
Shapes: B rows, T tokens, H heads, D size of a head.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.base.attention import whole_rows
from orchestrator.base.model import head
from orchestrator.config import Method, Task
from orchestrator.methods import Bank, method_of
from orchestrator.methods.slot import Part
from orchestrator.methods.table import HEAD
from orchestrator.train.loss import loss_in_place_of_logits

META = torch.device("meta")


@dataclass(frozen=True)
class Pass:
    """A micro-batch and how it is computed."""

    rows: int
    """Rows of all slots together."""
    length: int
    """Tokens of a row."""
    targets: int
    """Tokens of it, or texts to classify, that count in the loss."""
    recompute: bool = False
    """Whether activations are recomputed."""
    masked: bool = False
    """Whether rows hold several samples, so that attention is given a mask."""
    keep_gradients: bool = False
    """Whether gradients stay where they are between steps, as CUDA graphs want it."""
    in_order: bool = True
    """Whether the slots' tokens lie as the bank's stacks do; else each linear picks out copies."""


@dataclass(frozen=True)
class Footprint:
    """Bytes beside those of the base."""

    delta: int
    """The slots' tensors, in fp32, padded to the largest slot, and what their hooks need beside them."""
    gradients: int
    """Of the delta."""
    moments: int
    """AdamW's two, in fp32."""
    kept: int
    """What is kept between forward and backward pass."""
    peak: int
    """The most that a pass takes at once, gradients included."""


def rehearse(model: Any, bank: Bank, work: Pass) -> Footprint:
    """Run a pass on shapes.

    Args:
        model: of ``base.empty``, with gradient checkpointing off.
        bank: around it, on the meta device, its slots filled by ``fill``.
        work: what to run; its rows are dealt to the slots in turn.
    """
    leaves, held = list(bank.leaves().values()), bank.held()
    meter = _Meter([*model.parameters(), *model.buffers(), *held])
    trained = sum(p.numel() for slot in bank.slots for p in bank.parameters(slot).values())
    slot_BT, ids_BT = _rows(bank, work)
    steps = dict.fromkeys(bank.slots, 0)
    routed = bank.routed(slot_BT, position_BT=ids_BT, sample_BT=ids_BT, steps=steps)
    with _recomputing(model, work.recompute), routed, _kernels(), meter:
        for leaf in leaves:
            leaf.grad = torch.empty_like(leaf) if work.keep_gradients else None
        total = _forward(model, bank, work, slot_BT, ids_BT)
        kept = meter.live
        total.backward()  # type: ignore[no-untyped-call]
    gradients = sum(_size(leaf) for leaf in leaves)
    for leaf in leaves:
        leaf.grad = None
    return Footprint(sum(_size(t) for t in held), gradients, 8 * trained, kept, meter.peak)


def fill(bank: Bank, slots: Sequence[tuple[Method, Task | None]]) -> None:
    """Fill slots 0, 1, ... with tensors that have a shape alone, so that no start value is computed."""
    for slot, (knobs, task) in enumerate(slots):
        method = method_of(knobs)
        parts = [Part.of(method, knobs, bank.scope)]
        if task is not None and task.type == "classification":
            parts.append(Part.of(HEAD, task, bank.scope))
        shapes = {name: shape for part in parts for name, shape in part.shapes(bank.scope).items()}
        empty = {name: torch.empty(shape, device=META) for name, shape in shapes.items()}
        bank.add(slot, knobs, tensors=empty, task=task)


def _rows(bank: Bank, work: Pass) -> tuple[Tensor, Tensor]:
    """Slot of each token, dealt row by row, and ids."""
    order = bank.slots if work.in_order else bank.slots[::-1]
    slot_B = torch.tensor([order[row * len(order) // work.rows] for row in range(work.rows)])
    ids_BT = torch.empty(work.rows, work.length, dtype=torch.long, device=META)
    return slot_B.unsqueeze(1).expand(work.rows, work.length), ids_BT


def _forward(model: Any, bank: Bank, work: Pass, slot_BT: Tensor, ids_BT: Tensor) -> Tensor:
    place_N = torch.empty(work.targets, dtype=torch.long, device=META)
    mask = whole_rows(META)
    if work.masked:
        mask = torch.empty(work.rows, 1, work.length, work.length, dtype=torch.bool, device=META)
    call = {"input_ids": ids_BT, "position_ids": ids_BT, "attention_mask": mask}
    if bank.task(bank.slots[0]) is not None:
        pooled_PH = model(**call).last_hidden_state.flatten(0, 1).index_select(0, place_N)
        slot_P = slot_BT.flatten()[torch.linspace(0, slot_BT.numel() - 1, work.targets).long()]
        return bank.classify(pooled_PH, slot_P).sum()
    with loss_in_place_of_logits(head(model), place_N, place_N):
        losses_N: Tensor = model(**call, use_cache=False).logits
    return losses_N.sum()


@contextmanager
def _recomputing(model: Any, on: bool) -> Iterator[None]:
    if on:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            model.gradient_checkpointing_disable()
            model.eval()


class _Meter(TorchDispatchMode):
    """Adds up the storages of meta tensors while they live."""

    def __init__(self, free: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in free:
            storage = tensor.untyped_storage()
            self._seen[id(storage)] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.is_meta:
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def _kernels() -> Iterator[None]:
    """Inside, attention on shapes is that of a fused kernel; torch's own would be the plain formula."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attend, "AutogradMeta")
        yield


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its output, a number for each query, and a mask as the numbers that are added to scores."""

    @staticmethod
    def forward(ctx: Any, query_BHTD: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, tokens, size = query_BHTD.shape
        out_BHTD = query_BHTD.new_empty(rows, tokens, heads, size).transpose(1, 2)
        log_z_BHT = query_BHTD.new_empty(rows, heads, tokens, dtype=torch.float32)
        bias = () if mask is None else (query_BHTD.new_empty(mask.shape) if mask.dtype == torch.bool else mask,)
        ctx.save_for_backward(query_BHTD, key, value, out_BHTD, log_z_BHT, *bias)
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def slot_bytes(bank: Bank, slot: int) -> Mapping[str, int]:
    """Bytes of one slot alone: ``delta``, ``gradients``, ``moments``."""
    trained = 4 * sum(p.numel() for p in bank.parameters(slot).values())
    whole = sum(_size(t) for t in bank.windows(slot).values())
    return {"delta": whole, "gradients": trained, "moments": 2 * trained}
