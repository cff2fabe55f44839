"""Small training passes as CUDA graphs: forward and backward of one slot's micro-batch are one launch.

Up to some thousand tokens a GPU computes a pass faster than a CPU launches its kernels. A graph replays them from fixed
memory, so all that varies is copied there: tokens, labels, positions and the weight of the losses. Gradients are added
to the leaves' own, which keep their place (``Bank.zero_grad(keep=True)``). Widths are rounded up, so that few graphs
serve a run; a shape gets one when it comes for the third time.
Shapes: B rows, T tokens.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.base.attention import looks_back, whole_rows
from orchestrator.data.batch import IGNORE, Batch
from orchestrator.errors import TrainError
from orchestrator.methods import Bank
from orchestrator.train.loss import causal_lm_loss, fixed_loss
from orchestrator.train.reporter import Reporter

MOST_TOKENS = 4096
"""Of a pass; beyond, launching is hidden behind computing."""
MOST_GRAPHS = 24
"""Shapes that get a graph; the rest go without."""
_SEEN = 2
_STEP = 64
_FAR = 0.05
"""Relative distance between graph and plain pass, in loss and in norm of the gradients, that bf16 does not explain."""

Work = Callable[[], None]
Record = Callable[[Work], Work]
"""Makes of some work on fixed memory a cheaper way to do it again; the work is done some times on the way."""


@dataclass(frozen=True)
class Shape:
    """What passes that share a graph have in common."""

    slot: int
    rows: int
    width: int
    whole: bool
    """Whether each row is one sequence; else a mask is made of the positions."""


class CudaRecorder:
    """Records work as graphs that share one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Do it three times, so that everything lazy is done, and record it."""
        gc.collect()  # what an earlier pass left would tie the leaves to that pass's stream
        around = torch.cuda.current_stream()
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                work()
        around.wait_stream(self._stream)
        torch.cuda.empty_cache()  # the pool is not the plain passes' memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        replay: Work = graph.replay
        return replay


class Graphs:
    """The graphs of one rank.

    Args:
        model: what is called.
        bank: around it.
        device: of both.
        length: most tokens of a row.
        warn: hears why there are no graphs, where recording fails.
        record: how to record.
    """

    def __init__(
        self,
        model: Any,
        bank: Bank,
        *,
        device: torch.device,
        length: int,
        warn: Callable[[str], None],
        record: Record | None = None,
    ) -> None:
        self.model, self.bank, self.device, self.warn = model, bank, device, warn
        self.on = True
        """Off after a failure: then passes are plain."""
        self._step = -(-max(length, 1) // (8 * _STEP)) * _STEP
        self._record = record or CudaRecorder(device)
        self._passes: dict[Shape, _Pass] = {}
        self._seen: dict[Shape, int] = {}
        self._bound: tuple[int, list[tuple[Tensor, Tensor | None]]] = (-1, [])
        """The bank's version, and its leaves with their gradients, that the graphs stand on."""

    @classmethod
    def of(cls, model: Any, bank: Bank, device: torch.device, length: int, reporter: Reporter) -> "Graphs | None":
        """Those of a run; None where the device has none."""
        if device.type != "cuda":
            return None
        return cls(model, bank, device=device, length=length, warn=lambda t: reporter.event("warning", {"text": t}))

    def run(self, batch: Batch, weight: Tensor) -> Tensor | None:
        """Forward and backward pass.

        Args:
            batch: on the CPU.
            weight: of each target's loss in what is differentiated, a scalar.

        Returns:
            The sum of the losses, fp64, until the next call; or None where this pass has no graph, and nothing is done.
        """
        shape = self._shape(batch) if self.on else None
        if shape is None:
            return None
        self._check_bound()
        if shape not in self._passes:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= _SEEN or len(self._passes) >= MOST_GRAPHS:
                return None
            try:
                self._passes[shape] = self._make(shape, batch, weight)
            except Exception as e:  # whatever it is, a plain pass meets it again, if it is no matter of graphs
                self.on = False
                self._passes.clear()
                self.warn(f"no CUDA graphs, small passes take longer: {type(e).__name__}: {e}")
                return None
        return self._passes[shape].run(batch, weight)

    def _shape(self, batch: Batch) -> Shape | None:
        rows, tokens = batch.slot_BT.shape
        width = -(-tokens // self._step) * self._step
        slot = int(batch.slot_BT[0, 0])
        if rows * width > MOST_TOKENS or slot < 0 or not bool((batch.slot_BT == slot).all()):
            return None
        if not self.bank.steady(slot):
            return None
        one_each = bool((batch.segment_BT[batch.sample_BT >= 0] == 0).all())
        return Shape(slot, rows, width, one_each and looks_back(self.model, width))

    def _check_bound(self) -> None:
        """Graphs of memory that is no longer the bank's are forgotten."""
        version, leaves = self._bound
        if version == self.bank.version and all(leaf.grad is grad for leaf, grad in leaves):
            return
        self._passes.clear()
        self._seen.clear()
        self._bound = self.bank.version, [(leaf, leaf.grad) for leaf in self.bank.leaves().values()]

    def _make(self, shape: Shape, batch: Batch, weight: Tensor) -> "_Pass":
        made = _Pass(self.model, self.bank, shape, self.device)
        grads = [grad for _, grad in self._bound[1] if grad is not None]
        if len(grads) < len(self._bound[1]):
            raise TrainError("gradients have no place of their own: zero_grad(keep=True) comes first")
        kept = [grad.clone() for grad in grads]
        try:
            made.fill(batch, weight)
            made.replay = self._record(made.work)
            made.inputs.tokens_BT.copy_(made.inputs.tokens_BT.roll(1, 1))  # what was recorded must not know the values
            _same(_measure(made.replay, made, grads), _measure(made.plain_work, made, grads))
        finally:
            torch._foreach_copy_(grads, kept)
        return made


class _Pass:
    """One shape's memory and work."""

    def __init__(self, model: Any, bank: Bank, shape: Shape, device: torch.device) -> None:
        self.model, self.bank, self.shape = model, bank, shape
        size = shape.rows, shape.width
        self.slot_BT = torch.full(size, shape.slot)
        columns = torch.zeros(3, *size, dtype=torch.long, device=device)
        self.columns = columns
        tokens_BT, labels_BT, position_BT = columns
        unused_BT = self.slot_BT  # segments show in positions, samples matter to dropout
        self.inputs = Batch(tokens_BT, labels_BT, self.slot_BT, unused_BT, position_BT, unused_BT)
        self.mask = whole_rows(device) if shape.whole else None
        self.weight = torch.zeros((), device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.replay: Work = self.work

    def run(self, batch: Batch, weight: Tensor) -> Tensor:
        """See ``Graphs.run``."""
        self.fill(batch, weight)
        self.replay()
        return self.total

    def fill(self, batch: Batch, weight: Tensor) -> None:
        """Copy what varies; beyond the batch's width there is padding that no token before it sees."""
        wide = self.shape.width - batch.tokens_BT.shape[1]
        given = ((batch.tokens_BT, 0), (batch.labels_BT, IGNORE), (batch.position_BT, 0))
        columns = torch.stack([nn.functional.pad(column, (0, wide), value=value) for column, value in given])
        pinned = columns.pin_memory() if self.columns.is_cuda else columns
        self.columns.copy_(pinned, non_blocking=True)
        self.weight.copy_(weight)

    def work(self) -> None:
        """What is recorded."""
        with self._routed():
            self._finish(fixed_loss(self.model, self.inputs, self.mask))

    def plain_work(self) -> None:
        """The same as a pass without graphs does it."""
        with self._routed():
            self._finish(causal_lm_loss(self.model, self.inputs)[0])

    def _routed(self) -> Any:
        steps: Mapping[int, int] = {self.shape.slot: 0}  # for dropout, of which there is none
        return self.bank.routed(self.slot_BT, position_BT=self.inputs.position_BT, steps=steps)

    def _finish(self, losses_N: Tensor) -> None:
        self.total.copy_(losses_N.detach().double().sum())
        (losses_N * self.weight).sum().backward()  # type: ignore[no-untyped-call]


def _measure(work: Work, made: _Pass, grads: list[Tensor]) -> tuple[float, float]:
    """Loss and norm of the gradients."""
    torch._foreach_zero_(grads)
    work()
    return float(made.total), float(torch.stack(torch._foreach_norm(grads)).norm())


def _same(got: tuple[float, float], want: tuple[float, float]) -> None:
    for what, a, b in zip(("loss", "gradient norm"), got, want, strict=True):
        if not abs(a - b) <= _FAR * abs(b):
            raise TrainError(f"a recorded pass does not do what a plain one does: {what} {a:.6g}, not {b:.6g}")
