"""A training pass on shapes alone: the run's own code on the meta device, and a meter of the memory that it would take.

What autograd keeps, what a recomputation makes again, what is in passing while gradients are made: all of it is asked
of the code that runs, so a new method or architecture needs no formula here. Written down are only kernels that cannot
run on shapes: attention (Dao 2023, arXiv:2307.08691: keeps queries, keys, values, output, and a number for each query)
and those of ``base/empty.py``.
Shapes: B rows, T tokens, H heads, D size of a head.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.base.attention import whole_rows
from orchestrator.base.encoder import Reader
from orchestrator.base.model import head
from orchestrator.config import Classification, Method, Task
from orchestrator.errors import BaseModelError
from orchestrator.methods import Bank, method_of
from orchestrator.methods.slot import Part
from orchestrator.methods.table import HEAD
from orchestrator.train.loss import loss_in_place_of_logits
from orchestrator.train.meter import Meter, Work, attention_work, size_of

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
    encoder: bool = False
    """Whether the model reads both ways."""
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
    work: Counter[Work]
    """The kernels of a pass, and how often each runs."""


def rehearse(model: Any, bank: Bank, work: Pass) -> Footprint:
    """Run a pass on shapes.

    Args:
        model: of ``base.empty``, with gradient checkpointing off.
        bank: around it, on the meta device, its slots filled by ``fill``.
        work: what to run; its rows are dealt to the slots in turn.

    Raises:
        BaseModelError: the model looks at values, such as experts at which tokens are theirs.
    """
    leaves, held = list(bank.leaves().values()), bank.held()
    meter = Meter([*model.parameters(), *model.buffers(), *held])
    trained = sum(p.numel() for slot in bank.slots for p in bank.parameters(slot).values())
    slot_BT, ids_BT = _rows(bank, work)
    steps = dict.fromkeys(bank.slots, 0)
    routed = bank.routed(slot_BT, position_BT=ids_BT, sample_BT=ids_BT, steps=steps)
    with _recomputing(model, work.recompute), routed, _kernels(meter), meter:
        for leaf in leaves:
            leaf.grad = torch.empty_like(leaf) if work.keep_gradients else None
        try:
            total = _forward(model, bank, work, slot_BT, ids_BT)
            kept = meter.live
            total.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as e:
            reason = str(e).strip().splitlines()[0]
            raise BaseModelError(
                f"{type(model).__name__} cannot be rehearsed on shapes alone, so there is no plan for it: {reason}"
            ) from e
    gradients = sum(size_of(leaf) for leaf in leaves)
    for leaf in leaves:
        leaf.grad = None
    return Footprint(sum(size_of(t) for t in held), gradients, 8 * trained, kept, meter.peak, meter.work)


def fill(bank: Bank, slots: Sequence[Method], task: Task) -> None:
    """Fill slots 0, 1, ... with tensors that have a shape alone, so that no start value is computed."""
    for slot, knobs in enumerate(slots):
        method = method_of(knobs)
        parts = [Part.of(method, knobs, bank.scope)]
        if isinstance(task, Classification):
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
    if isinstance(bank.task(bank.slots[0]), Classification):
        if work.encoder:
            hidden_BTH, _ = Reader(model, encoder=True, packed=work.masked)(ids_BT, ids_BT, ids_BT, ids_BT < 0, None)
        else:
            hidden_BTH = model(**call).last_hidden_state
        pooled_PH = hidden_BTH.flatten(0, 1).index_select(0, place_N)
        slot_P = slot_BT.flatten()[torch.linspace(0, slot_BT.numel() - 1, work.targets).long()]
        return bank.classify(pooled_PH, slot_P).sum()
    if any(bank.changes_head(slot) for slot in bank.slots):  # then a run takes the model's own logits
        wanted_NV = model(**call, use_cache=False).logits.flatten(0, 1).index_select(0, place_N).float()
        return nn.functional.cross_entropy(wanted_NV, place_N, reduction="none").sum()
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


@contextmanager
def _kernels(meter: Meter) -> Iterator[None]:
    """Inside, attention on shapes is that of a fused kernel; torch's own would be the plain formula."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Any:
        return _Attention.apply(query, key, value, attn_mask, meter.work)  # type: ignore[no-untyped-call]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", attend, "AutogradMeta")
        yield


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its output, a number for each query, and a mask as the numbers that are added to scores."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, work: Counter[Work]
    ) -> Tensor:
        rows, heads, tokens, size = query.shape
        out_BHTD = query.new_empty(rows, tokens, heads, size).transpose(1, 2)
        log_z_BHT = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        bias = () if mask is None else (query.new_empty(mask.shape) if mask.dtype == torch.bool else mask,)
        ctx.save_for_backward(query, key, value, out_BHTD, log_z_BHT, *bias)
        causal = mask is None and tokens == key.shape[2]
        ctx.one = attention_work(rows, heads, tokens, key.shape[2], size, query.element_size(), causal)
        ctx.work = work
        work[ctx.one] += 1
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        one: Work = ctx.one
        ctx.work[Work(2.5 * one.flops, 2 * one.traffic, one.least)] += 1  # five products in place of two
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
