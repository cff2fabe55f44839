"""What a run or a pack takes of a device, before anything starts.

A pass is rehearsed on shapes (``rehearse.py``); beside it stand the base's bytes, AdamW's, and what the driver, NCCL
and the allocator take for themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.base import compute_dtype
from orchestrator.base.empty import bytes_of, empty_held, state_bytes_of
from orchestrator.base.model import bare, decoder_layers
from orchestrator.config import Base, Classification, Method, Task, Zero
from orchestrator.errors import ConfigError, MethodError
from orchestrator.methods import Bank, Scope, method_of
from orchestrator.train.graph import MOST_TOKENS
from orchestrator.train.rehearse import META, Footprint, Pass, fill, rehearse

_CONTEXT = 512 * 2**20
"""CUDA's own memory in a process, with its kernels, about; nvidia-smi shows it, torch does not count it."""
_NCCL = 512 * 2**20
"""NCCL's buffers, about, where there are several ranks."""
_HOST = 600 * 2**20
"""Python, torch and Ray in a worker on a CPU, about."""
_FRAGMENTS = 0.04
"""Share of a pass's memory that the allocator cannot hand out again, about."""


@dataclass(frozen=True)
class Shape:
    """How slots are trained."""

    rows: int
    """Rows of a pass, of all slots together."""
    length: int
    """Tokens of a row."""
    recompute: bool = False
    packed: bool = False
    """Whether rows hold several samples, so that attention is given a mask."""
    stage: int = 0
    """ZeRO stage."""
    ranks: int = 1
    in_order: bool = True
    """Whether slots' tokens lie as the bank's stacks do; in a pack of several methods they do not."""
    keep_gradients: bool | None = None
    """Whether gradients stay between steps; default: where CUDA graphs may be, as in a run."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    base: int
    """The frozen base, or this rank's share of it."""
    gathered: int
    """Of the other ranks' shares, what is whole at once."""
    delta: int
    """Slots' tensors and AdamW's moments; gradients too, where they stay between steps."""
    kept: int
    """Activations kept between forward and backward pass."""
    passing: int
    """What comes and goes on top: the loss head, gradients, weights made dense, a layer that is recomputed."""
    workspace: int
    """cuBLAS."""
    graphs: int
    """Memory of CUDA graphs, which nothing else can use; where there is no room for it, a run goes without them."""
    own: int
    """Of the driver, NCCL and the allocator, which no counter of torch's shows."""
    loading: int
    """The most while the base is loaded; it is freed before the first step."""

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` would say."""
        held = self.base + self.delta + self.workspace
        return max(held + self.gathered + self.kept + self.passing, self.loading)

    @property
    def needed(self) -> int:
        """What the device has to have; without CUDA graphs."""
        return self.allocated + self.own


class Estimator:
    """Rehearses on one base; what it has rehearsed it remembers.

    Args:
        base: which, and how it is held.
        task: what is learnt.
        gpu: whether workers have one.
        encoder: whether the base is a bare transformer that reads both ways.
        workspace: bytes that cuBLAS takes.
        zero: how it is sharded, where it is.
    """

    def __init__(
        self,
        base: Base,
        task: Task,
        *,
        gpu: bool,
        encoder: bool = False,
        workspace: int = 64 * 2**20,
        zero: Zero | None = None,
    ) -> None:
        self.base, self.task, self.gpu, self.encoder, self.zero = base, task, gpu, encoder, zero or Zero()
        self.workspace = workspace if gpu else 0
        self.dtype = compute_dtype(base, "cuda" if gpu else "cpu")
        self._models: dict[frozenset[int], Any] = {}
        self._seen: dict[str, Footprint] = {}

    @cached_property
    def scope(self) -> Scope:
        """The base, as methods see it."""
        return Scope.of(self.model(frozenset()), self.base.id)

    def model(self, unquantized: frozenset[int]) -> Any:
        """The empty base."""
        if unquantized not in self._models:
            made = empty_held(self.base, self.dtype, gpu=self.gpu, encoder=self.encoder, unquantized=unquantized)
            self._models[unquantized] = bare(made) if isinstance(self.task, Classification) else made
        return self._models[unquantized]

    def footprint(self, slots: Sequence[Method], shape: Shape) -> Footprint:
        """Of a pass of these slots.

        Raises:
            MethodError: a method does not fit the base, or is not this project's own.
        """
        if not all(method_of(knobs).mixes for knobs in slots):
            raise MethodError("there is no plan for the peft library's own modules: they do not run on shapes alone")
        key = f"{slots!r} {shape!r}"
        if key not in self._seen:
            model = self.model(self._unquantized(slots))
            bank = Bank(model, device=META, base_id=self.base.id, fuse=self.gpu)
            try:
                fill(bank, slots, self.task)
                self._seen[key] = rehearse(model, bank, self._pass(slots, shape))
            finally:
                bank.detach()
        return self._seen[key]

    def memory(self, slots: Sequence[Method], shape: Shape) -> Memory:
        """Of each device; see ``footprint``."""
        model, found = self.model(self._unquantized(slots)), self.footprint(slots, shape)
        base, gathered, layer = self._base(model, shape)
        keep = self._keeps(slots, shape)
        moments = found.moments // shape.ranks if shape.stage in (1, 2) else found.moments
        staying = found.gradients if keep else 0
        graphed = self.graphed(slots, shape)
        # A recorded pass is compared with a plain one, for which the gradients are set aside.
        aside = found.gradients if graphed else 0
        dearest = max((m.in_features * m.out_features for m in _linears(model)), default=0)
        peak = found.peak - staying
        return Memory(
            base=base,
            gathered=gathered,
            delta=found.delta + moments + staying,
            kept=found.kept - staying,
            passing=found.peak - found.kept + aside,
            workspace=self.workspace,
            graphs=peak if graphed else 0,
            own=self._own(shape, peak),
            loading=base + layer + round(dearest * 2.5),
        )

    def graphed(self, slots: Sequence[Method], shape: Shape) -> bool:
        """Whether a pass is a CUDA graph, once its shape has come for the third time."""
        method = method_of(slots[0])
        lone = len(slots) == 1 and not method.dropout(slots[0])
        return self._may_graph(slots, shape) and lone and shape.rows * shape.length <= MOST_TOKENS

    def _may_graph(self, slots: Sequence[Method], shape: Shape) -> bool:
        if len(slots) > 1 or isinstance(self.task, Classification) or slots[0].whole_base:
            return False
        head = self.scope.head in method_of(slots[0]).sites(slots[0], self.scope)
        return self.gpu and shape.stage != 3 and not shape.recompute and not head

    def _keeps(self, slots: Sequence[Method], shape: Shape) -> bool:
        return self._may_graph(slots, shape) if shape.keep_gradients is None else shape.keep_gradients

    def _pass(self, slots: Sequence[Method], shape: Shape) -> Pass:
        lead = max(method_of(knobs).virtual_tokens(knobs) for knobs in slots)
        length = shape.length + (lead if isinstance(self.task, Classification) and not shape.packed else 0)
        texts = shape.rows if isinstance(self.task, Classification) else shape.rows * length
        return Pass(
            rows=shape.rows,
            length=length,
            targets=texts,
            recompute=shape.recompute,
            masked=shape.packed or isinstance(self.task, Classification),
            keep_gradients=self._keeps(slots, shape),
            encoder=self.encoder,
            in_order=shape.in_order,
        )

    def _unquantized(self, slots: Sequence[Method]) -> frozenset[int]:
        count = self.scope.count
        wanted = (
            {method_of(knobs).unquantized(knobs, count) for knobs in slots}
            if self.base.quantize != "none"
            else {frozenset[int]()}
        )
        if len(wanted) > 1:
            raise ConfigError("these methods want different layers unquantized; they cannot share a base")
        return wanted.pop()

    def _base(self, model: Any, shape: Shape) -> tuple[int, int, int]:
        """Bytes here, bytes gathered at once, and bytes of a layer that is whole while it is loaded."""
        if shape.stage != 3:
            return bytes_of(model), 0, 0
        sizes = [(p.numel(), p.numel() * p.element_size()) for p in model.parameters()]
        bound = self.zero.persistence_threshold
        whole = sum(size for count, size in sizes if count < bound)
        shared = sum(size for count, size in sizes if count >= bound)
        _, layers = decoder_layers(model)
        layer = max(sum(p.numel() * p.element_size() for p in one.parameters()) for one in layers)
        table = max(size for _, size in sizes)
        away = 1 - 1 / shape.ranks
        if self.zero.offload == "cpu" and self.gpu:
            return whole + state_bytes_of(model), max(2 * layer, table), layer
        # Two layers, since the next one is fetched ahead.
        gathered = round(max(2 * layer, table) * away)
        return shared // shape.ranks + whole + state_bytes_of(model), gathered, round(layer * away)

    def _own(self, shape: Shape, peak: int) -> int:
        fixed = _CONTEXT + (_NCCL if shape.ranks > 1 else 0) if self.gpu else _HOST
        return fixed + round(_FRAGMENTS * peak)


def _linears(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]


def estimator_of(run: Any, *, gpu: bool, encoder: bool, workspace: int = 64 * 2**20) -> Estimator:
    """For a run or a search."""
    task = run.task
    if isinstance(task, Classification) and not task.labels:
        task = task.model_copy(update={"labels": ("a", "b")})  # their number hardly matters
    return Estimator(run.base, task, gpu=gpu, encoder=encoder, workspace=workspace, zero=run.cluster.zero)
