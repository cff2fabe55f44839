"""How much each weight of the frozen base matters to the training data: the diagonal of the empirical Fisher matrix.

``F = mean over samples of (d loss / d W)^2``, the loss a sample's mean over its target tokens, or that of its label
under the head that training starts with (Sung et al. 2021, arXiv:2111.09839). The base's weights stay frozen: their
gradient is ``dy^T x``, had from each layer's input and the gradient of its output. Shapes: T tokens, O outputs, I
inputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.base.memory import host_memory
from orchestrator.config import Classification, Method, Task
from orchestrator.data import Batch, Row, Sample, SampleSource, collate
from orchestrator.data.batch import NO_SLOT
from orchestrator.errors import OutOfMemoryError
from orchestrator.methods import Bank, Scope
from orchestrator.train.classify import Classifier
from orchestrator.train.engine import Engine
from orchestrator.train.loss import plain_loss
from orchestrator.train.step import Loss


@contextmanager
def first_loss(
    bank: Bank, model: Any, knobs: Method, task: Task, *, seed: int, encoder: bool, slot: int = 0
) -> Iterator[Loss]:
    """The loss that a run starts with, for ``fisher``: of next tokens, or of labels under the head's start value.

    The head needs a slot, so the method is in it meanwhile, with whatever places: nothing is added at them yet.

    Args:
        bank: around the base.
        model: what the engine started; the bare transformer for a classification.
        knobs: the run's method, one that starts as the base.
        task: the run's, labels included.
        seed: that the slot will have.
        encoder: whether the base reads both ways.
        slot: an empty one; it is so again afterwards.
    """
    if not isinstance(task, Classification):
        yield lambda _, batch: plain_loss(model, batch)
        return
    blind = {site: torch.zeros(()).expand(shape) for site, shape in bank.scope.linears.items()}
    bank.add(slot, knobs, seed=seed, task=task, importance=blind)
    classifier = Classifier(bank, encoder=encoder, packed=False)

    def of_labels(_: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        mine = replace(batch, slot_BT=torch.full_like(batch.slot_BT, slot))
        with bank.routed(mine.slot_BT, position_BT=mine.position_BT, sample_BT=mine.sample_BT):
            return classifier(model, mine)

    try:
        yield of_labels
    finally:
        bank.remove(slot)


def fisher(
    model: Any, engine: Engine, loss: Loss, source: SampleSource, *, sites: Sequence[str], scope: Scope, count: int
) -> dict[str, Tensor]:
    """F [O, I] of each site, fp32, on the CPU, the same on every rank. Every rank must call it.

    Args:
        model: the loaded base.
        engine: deals samples to ranks, and sums.
        loss: losses of a micro-batch's targets, see ``first_loss``.
        source: gives the samples; its cursor stays where it is.
        sites: linears.
        scope: of the base.
        count: samples.

    Raises:
        OutOfMemoryError: the host cannot hold F.
    """
    needed, free = sum(4 * o * i for o, i in map(scope.linears.__getitem__, sites)), host_memory()[1]
    if needed > free:
        raise OutOfMemoryError(
            f"the Fisher information of every target weight takes {needed / 2**30:.1f} GiB of the host on each worker, "
            f"{free / 2**30:.1f} GiB are free; take method.choose=magnitude, or fewer targets"
        )
    squares = {site: torch.zeros(scope.linears[site]) for site in sites}
    for sample, counts in _mine(source, count, engine):
        row = collate([Row(NO_SLOT, [sample])], pad_id=0).to(engine.device)
        with _gradients(model, scope, squares if counts else {}):
            losses_N, _ = loss(model, row)
            losses_N.mean().backward()  # type: ignore[no-untyped-call]
    for square in squares.values():
        square.copy_(engine.sum_(square.to(engine.device, copy=True)).div_(count))
    return squares


def _mine(source: SampleSource, count: int, engine: Engine) -> Iterator[tuple[Sample, bool]]:
    """This rank's samples, and whether each counts: all ranks walk equally far, since a sharded base needs them all."""
    cursor = source.state()
    samples = source.take(count)
    source.load_state(cursor)
    for first in range(0, count, engine.ranks):
        at = first + engine.rank
        yield samples[min(at, count - 1)], at < count


@contextmanager
def _gradients(model: Any, scope: Scope, squares: dict[str, Tensor]) -> Iterator[None]:
    """Inside, one backward pass adds each site's squared weight gradient."""
    parts: dict[str, Tensor] = {}
    """Gradients of sites that are called for tokens and again for positions: the sum is squared."""

    def watch(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        site = names[module]
        x_TI = args[0].detach().flatten(0, -2)

        def add(grad: Tensor) -> None:
            gradient_OI = grad.flatten(0, -2).float().T @ x_TI.float()
            if site in scope.shared_inputs:
                parts[site] = parts[site] + gradient_OI if site in parts else gradient_OI
            else:
                squares[site].add_(gradient_OI.square_().to(squares[site].device))

        if not y.requires_grad:  # of positions, which come after no embedding of tokens
            y.requires_grad_()
        y.register_hook(add)  # type: ignore[no-untyped-call]

    names = {model.get_submodule(site): site for site in squares}
    handles = [module.register_forward_hook(watch) for module in names]
    # Nothing of the base wants a gradient, so the embeddings do: everything after them has one then.
    words = model.get_submodule(scope.words)
    handles.append(words.register_forward_hook(lambda _, __, e: e.detach().requires_grad_()))
    try:
        yield
        for site, gradient_OI in parts.items():
            squares[site].add_(gradient_OI.square_().to(squares[site].device))
    finally:
        for handle in handles:
            handle.remove()
