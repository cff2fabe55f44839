"""A trial on its way into a pack: what has to fit, its data, its slot, its checkpoint, and what it costs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.config import Classification, Run
from orchestrator.config.checks import problems
from orchestrator.data import NO_SLOT, Prepared, SampleSource
from orchestrator.data.batch import Batch
from orchestrator.delta import check_base
from orchestrator.errors import ConfigError, MethodError
from orchestrator.methods import head_parameters, method_of
from orchestrator.train.checkpoint import Restored
from orchestrator.train.classify import Classifier
from orchestrator.train.fill import fill_slot, importance_of
from orchestrator.train.loss import plain_loss
from orchestrator.train.pack_step import PackStepper, Rows
from orchestrator.train.packed_adamw import Course, PackedAdamW
from orchestrator.train.probe import Probe, short_row
from orchestrator.train.setup import Ground, first_rank_first, layer_count, total_steps
from orchestrator.train.shelf import Shelf
from orchestrator.train.standing import Snapshot, Standing
from orchestrator.train.writer import DeltaWriter

_TOKENS = 64
"""Of the row on which a trial is tried out."""
_TIMES = 3


@dataclass
class Member:
    """A trial in the pack."""

    trial: str
    slot: int
    run: Run
    source: SampleSource
    data: Prepared
    course: Course
    standing: Standing
    writer: DeltaWriter
    saved_at: int = -1
    cursor: dict[str, Any] | None = None
    """Of its data, before the step that is under way."""

    @property
    def why(self) -> str | None:
        """Why it is at its end, if it is."""
        if self.standing.enough:
            return "stopped early"
        return None if self.course.steps_left else "finished"

    def snapshot(self, optimizer: PackedAdamW) -> Snapshot:
        """Its state between two steps."""
        values, moments = optimizer.state(self.slot)
        tensors = optimizer.bank.tensors(self.slot)
        return Snapshot(self.writer, self.standing, values, self.source.state(), moments, tensors)


class Door:
    """Lets trials in. Every rank lets in the same ones.

    Args:
        run: the pack's.
        ground: what slots are filled on.
        found: what a look at the base has shown.
        stepper: is told of each slot's rows.
        optimizer: trains the slots.
        most: slots of the pack.
    """

    def __init__(
        self, run: Run, ground: Ground, found: Probe, stepper: PackStepper, optimizer: PackedAdamW, most: int
    ) -> None:
        self.run, self.ground, self.found, self.most = run, ground, found, most
        self.stepper, self.optimizer = stepper, optimizer
        self.shelf = Shelf(ground.origin.tokenizer)
        self._layers = layer_count(run)
        self._bare = self._forward_seconds(NO_SLOT)

    def prepare(self, given: dict[str, Any]) -> tuple[Run, Prepared]:
        """A trial's config and data.

        Raises:
            ConfigError: it is not for this pack.
            MethodError: its method cannot stand beside others.
            DataError: its records are bad.
            TrainError: the ranks read different data.
        """
        engine = self.ground.engine

        def read() -> tuple[Run, Prepared]:
            run = Run.model_validate(given)
            self._check(run)
            return run, self.shelf.prepared(run)

        run, data = engine.agree(lambda: first_rank_first(engine, read))
        engine.same("data", data.digest)
        return run, data

    def admit(self, trial: str, slot: int, run: Run, data: Prepared, restored: Restored | None) -> Member:
        """Fill a slot.

        Raises:
            MethodError: the method does not fit the base.
            DeltaError: the checkpoint's delta is not the trial's.
            CheckpointError: nor is its optimizer.
        """
        bank, engine = self.ground.bank, self.ground.engine
        if restored:
            check_base(restored.delta.manifest, self.ground.origin.identity)
        measure = importance_of(self.ground, run, data, slot)
        # Where one rank alone lacks the memory, the others are not to wait for it in what follows.
        knobs = engine.agree(lambda: fill_slot(bank, slot, run, data.task, restored, None, measure))
        engine.broadcast(list(bank.windows(slot).values()), rank=0)  # singular vectors may differ between machines
        self.stepper.rows[slot] = Rows(run.data.length, run.data.packing and self.found.packs)
        train = run.train.model_copy(update={"lr": run.lr})
        total = total_steps(run, data)
        self.optimizer.join(slot, train, total)
        standing = Standing(train, total)
        if restored:
            self.optimizer.load_state(slot, restored.values["trial"], restored.optimizer)
            data.train.load_state(restored.values["cursor"])
            standing.restore(restored)
        course = self.optimizer.courses[slot]
        writer = DeltaWriter.of(run, self.ground.base.identity, bank, slot, knobs, data)
        saved_at = course.step if restored else -1
        return Member(trial, slot, run, data.train, data, course, standing, writer, saved_at)

    def dismiss(self, slot: int) -> None:
        """Empty a slot, however far it was filled."""
        if slot in self.optimizer.courses:
            self.optimizer.leave(slot)
        self.stepper.rows.pop(slot, None)
        if slot in self.ground.bank.slots:
            self.ground.bank.remove(slot)

    def cost(self, member: Member) -> dict[str, float]:
        """Trained parameters (of a head of its own none), bytes in training, seconds added to a forward pass.

        A backward pass, too: a slot that cannot be trained shows it here, where it is alone.
        """
        bank, slot, engine = self.ground.bank, member.slot, self.ground.engine
        trained = sum(p.numel() for p in bank.parameters(slot).values())
        head = head_parameters(member.data.task, bank.scope) if isinstance(member.data.task, Classification) else 0
        held = sum(t.numel() * t.element_size() for t in bank.windows(slot).values())
        engine.forget_order()
        batch = self._row(slot)
        with bank.routed(batch.slot_BT, position_BT=batch.position_BT, sample_BT=batch.sample_BT, steps={slot: 0}):
            losses_N, _ = self.stepper.loss_of(batch)(self.ground.model, batch)
            losses_N.sum().backward()  # type: ignore[no-untyped-call]
        bank.zero_grad()
        latency = self._forward_seconds(slot) - self._bare
        engine.forget_order()
        return {"parameters": trained - head, "memory": held + 3 * 4 * trained, "latency": max(0.0, latency)}

    def _check(self, run: Run) -> None:
        method, base = method_of(run.method), self.run.base
        if run.base != base:
            raise ConfigError(f"the pack's base is {base.id}, held as the search says; a trial has no other")
        if type(run.task) is not type(self.run.task):
            raise ConfigError(f"the pack learns {self.run.task.type}, not {run.task.type}")
        if wrong := problems(run):
            raise ConfigError("; ".join(f"{where}: {message}" for where, message in wrong))
        if run.train.init_from:
            raise ConfigError("train.init_from: a search's trials start afresh; take manta train to go on from a delta")
        if run.method.whole_base and self.ground.engine.stage == 3:
            raise MethodError(f"method {run.method.type} needs the whole base on each worker; it is sharded")
        if self.most > 1 and not (method.packs and method.mixes):
            raise MethodError(f"method {run.method.type} trains alone: in a pack of one slot")
        wanted = method.unquantized(run.method, self._layers)
        if base.quantize != "none" and wanted != self.ground.origin.unquantized:
            raise MethodError(
                f"method {run.method.type} wants layers {sorted(wanted) or 'none'} unquantized, the pack holds "
                f"{sorted(self.ground.origin.unquantized) or 'none'} so: its trials are a lane of their own"
            )

    def _row(self, slot: int) -> Batch:
        vocabulary = self.ground.bank.scope.embeddings[self.ground.bank.scope.words][0]
        tokens = [(7 * i + 3) % vocabulary for i in range(_TOKENS)]
        bank = None if slot == NO_SLOT else self.ground.bank
        return short_row(bank, slot, [tokens], self.ground.engine.device, label=0 if self.ground.classifies else None)

    def _forward_seconds(self, slot: int) -> float:
        """The quickest of some forward passes of one row."""
        bank, batch = self.ground.bank, self._row(slot)
        loss = self.stepper.loss
        run: Callable[..., Any] = loss.pool if isinstance(loss, Classifier) else plain_loss
        seconds = []
        for _ in range(_TIMES):
            begin = time.perf_counter()
            with torch.no_grad(), bank.routed(batch.slot_BT, position_BT=batch.position_BT):
                run(self.ground.model, batch)
            if batch.tokens_BT.is_cuda:
                torch.cuda.synchronize(batch.tokens_BT.device)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)
