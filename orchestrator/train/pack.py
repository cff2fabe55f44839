"""Many trials at once on one frozen base: they join and leave between steps, and each trains as it would alone."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from orchestrator.base import load_tokenizer
from orchestrator.config import Classification, Lora, Run
from orchestrator.data import Sample
from orchestrator.errors import CheckpointError, MantaError, OutOfMemoryError
from orchestrator.train.checkpoint import Restored, read_checkpoint
from orchestrator.train.classify import Classifier, evaluator
from orchestrator.train.desk import Lease, Orders
from orchestrator.train.loss import causal_lm_loss, plain_loss
from orchestrator.train.member import Door, Member
from orchestrator.train.pack_step import PackStepper
from orchestrator.train.packed_adamw import PackedAdamW
from orchestrator.train.probe import Probe
from orchestrator.train.reporter import PackReporter
from orchestrator.train.setup import (
    Ground,
    Place,
    Say,
    freeze_randomness,
    identify,
    load,
    look,
    open_engine,
    recompute,
)
from orchestrator.train.shelf import take
from orchestrator.train.step import Evaluate, Loss

T = TypeVar("T")
_LOOK_S = 5.0
"""Seconds between looks for a preempted node; a look is a barrier."""
_IDLE_S = 0.05
_SCOUT = 0
"""Slot of the look at the base; the trials' begin after it."""


@dataclass(frozen=True)
class Limits:
    """How much a pack holds."""

    slots: int = 8
    """Trials at once."""
    tokens: int = 16384
    """Of a forward pass of one rank, padding included. More is faster up to some thousands, and takes memory."""


def pack(run: Run, place: Place, reporter: PackReporter, limits: Limits | None = None) -> None:
    """Train what the orders bring, until they end.

    Args:
        run: base, task and cluster, that all trials share; of its method only which layers are held unquantized counts.
        place: which rank this is; a process group is up where there are several.
        reporter: brings orders, hears events, keeps checkpoints.
        limits: how many trials at once, in how large passes.

    Raises:
        OutOfMemoryError: with several ranks, or where nothing is left to make smaller; the reporter has been told.
    """
    freeze_randomness(run.train.seed)
    limits = limits or Limits()

    def say(kind: str, values: dict[str, Any]) -> None:
        if place.rank == 0:
            reporter.tell("", kind, values)

    run = _without_sharing(run, say)
    engine = open_engine(run, place, say)
    try:
        origin = identify(run, engine, load_tokenizer(run.base))
        ground = load(run, engine, origin)
        if run.train.recompute:
            recompute(ground)
        found = _scout(ground, run, say)
        Pack(run, ground, found, reporter, limits).run()
    finally:
        engine.close()


def _without_sharing(run: Run, say: Say) -> Run:
    """A pack's slots come and go, so their optimizer is on every rank."""
    zero = run.cluster.zero
    if zero.stage not in (1, 2):
        return run
    text = f"cluster.zero.stage={zero.stage}: a pack keeps its optimizer on every rank, as at stage 0"
    say("warning", {"text": text})
    zero = zero.model_copy(update={"stage": 0})
    return run.model_copy(update={"cluster": run.cluster.model_copy(update={"zero": zero})})


def _scout(ground: Ground, run: Run, say: Say) -> Probe:
    """Look at the base with a slot that is not trained."""
    task = Classification(labels=("a", "b")) if ground.classifies else None
    ground.bank.add(_SCOUT, Lora(rank=1), task=task)
    found = look(ground, run, _SCOUT, say)
    ground.bank.remove(_SCOUT)
    ground.engine.forget_order()
    return found


class Pack:
    """The loop. See ``pack``."""

    def __init__(self, run: Run, ground: Ground, found: Probe, reporter: PackReporter, limits: Limits) -> None:
        self.ground, self.engine, self.reporter = ground, ground.engine, reporter
        self.capacity = limits.slots
        loss: Loss = causal_lm_loss if found.in_head else plain_loss
        if ground.classifies:
            loss = classifier = Classifier(ground.bank, encoder=ground.encoder, packed=found.packs)
        pad_id = ground.origin.tokenizer.pad_token_id
        self.stepper = PackStepper(ground.model, ground.bank, self.engine, loss, tokens=limits.tokens, pad_id=pad_id)
        self.evaluate: Evaluate = evaluator(self.stepper, classifier) if ground.classifies else self.stepper.evaluate
        self.optimizer = PackedAdamW(ground.bank)
        self.door = Door(run, ground, found, self.stepper, self.optimizer, limits.slots)
        self.members: dict[str, Member] = {}
        """In the order in which they joined."""
        self._next_slot = _SCOUT + 1
        self._looked_at = time.monotonic()

    def run(self) -> None:
        """Step by step, until the orders end."""
        while True:
            orders = self._orders()
            for trial in orders.leave:
                if member := self.members.get(trial):
                    self._end(member, "withdrawn")
            for lease in orders.join:
                self._join(lease)
            if self.members:
                self._step()
            elif orders.close and not orders.join:
                return
            elif not orders.join:
                time.sleep(_IDLE_S)

    # -- orders -------------------------------------------------------------------------------------------------------

    def _orders(self) -> Orders:
        """The first rank's, on every rank; where there are none, that costs one small sum."""
        said = None
        if self.engine.rank == 0:
            orders = self.reporter.orders(max(0, self.capacity - len(self.members)))
            look = time.monotonic() - self._looked_at > _LOOK_S
            if orders or look:
                said = json.dumps({"orders": asdict(orders or Orders()), "look": look})
        said = self.engine.share(said)
        if said is None:
            return Orders()
        heard = json.loads(said)
        if heard["look"]:
            self._look()
        given = heard["orders"]
        return Orders(tuple(Lease(**lease) for lease in given["join"]), tuple(given["leave"]), given["close"])

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        if self.engine.most(int(self.reporter.preempted())):
            for member in list(self.members.values()):
                self._save(member)

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def _join(self, lease: Lease) -> None:
        if len(self.members) >= self.capacity:  # memory has shown it to be less than was asked for
            self._tell(lease.trial, "left", {"step": 0, "reason": "the pack is full"})
            return
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        member, cost, problem = None, {}, None
        try:
            run, data = self.door.prepare(lease.run)
            restored = self.engine.agree(partial(self._restored, lease.trial, run.name))
            member = self.door.admit(lease.trial, slot, run, data, restored)
            cost = self.door.cost(member)
        except torch.AcceleratorError:
            raise  # the device itself: no trial can go on
        except Exception as e:  # whatever it is, it is this trial's alone
            problem = e
        code = 0 if problem is None else 2 if isinstance(problem, torch.OutOfMemoryError) else 1
        code = self.engine.most(code)
        if code:
            self._refuse(lease, slot, code, problem)
            return
        assert member is not None
        self.members[lease.trial] = member
        course = member.course
        self._tell(lease.trial, "joined", {"step": course.step, "total": course.total, **cost})
        if (best := member.standing.best).step:  # of a checkpoint; the word on it may have been lost with a driver
            self._tell(lease.trial, "eval", {**best.metrics, "step": best.step, "best_step": best.step})
        if member.why:
            self._end(member, member.why)

    def _restored(self, trial: str, name: str) -> Restored | None:
        with self.reporter.restored(trial) as folder:
            return read_checkpoint(folder, name) if folder else None

    def _refuse(self, lease: Lease, slot: int, code: int, problem: Exception | None) -> None:
        self.door.dismiss(slot)
        self.ground.bank.zero_grad()
        _free_memory(self.engine.device)
        reason = str(problem) or type(problem).__name__ if problem else "it failed on another worker"
        if code == 2 and self.members:
            self._shrink(len(self.members), f"{lease.trial} did not fit beside {len(self.members)} others")
            self._tell(lease.trial, "left", {"step": 0, "reason": "out of memory: it waits for another slot"})
            return
        self._tell(lease.trial, "ended", {"why": "failed", "reason": reason, "step": 0, "metrics": {}, "tokens": 0})

    def _end(self, member: Member, why: str, reason: str | None = None) -> None:
        """A trial is done: its checkpoint stays, its slot is free."""
        if why != "failed" and not self._save(member):
            why, reason = "failed", "its last checkpoint cannot be written"
        standing = member.standing
        values = {
            "why": why,
            "step": member.course.step,
            "metrics": dict(standing.metrics),
            "tokens": standing.tokens,
            **({"reason": reason} if reason else {}),
        }
        self._drop(member)
        self._tell(member.trial, "ended", values)

    def _drop(self, member: Member) -> None:
        self.door.dismiss(member.slot)
        del self.members[member.trial]

    def _save(self, member: Member) -> bool:
        """Whether it was kept, on every rank; where not, the one before it is still there."""
        if member.saved_at == member.course.step:
            return True  # written anew, it would be torn for a moment
        failed = 0
        if self.engine.rank == 0:
            try:
                snapshot = member.snapshot(self.optimizer)
                self.reporter.checkpoint(member.trial, member.course.step, snapshot.write)
            except (CheckpointError, OSError) as e:
                failed = 1
                self._tell(member.trial, "warning", {"text": f"no checkpoint at step {member.course.step}: {e}"})
        if self.engine.most(failed):
            return False
        member.saved_at = member.course.step
        self._tell(member.trial, "saved", {"step": member.course.step})
        return True

    # -- a step -------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        begin = time.perf_counter()
        samples = self._take()
        losses = self._train(samples)
        if losses is None:
            return
        told = self.optimizer.step()
        loss_of, seconds = losses(), time.perf_counter() - begin
        for member in list(self.members.values()):
            slot = member.slot
            member.standing.metrics["loss"] = loss_of[slot]
            member.standing.tokens += sum(len(s.tokens) for s in samples[slot])
            if member.course.trouble:
                self._end(member, "failed", member.course.trouble)
                continue
            self._tell_step(member, told[slot], seconds)
        self._evaluate()
        for member in list(self.members.values()):
            due = member.course.step % member.standing.rhythm.checkpoint == 0
            if member.why:
                self._end(member, member.why)
            elif due:
                self._save(member)

    def _take(self) -> dict[int, list[Sample]]:
        """Everyone's next samples; a trial that meets a bad record ends."""
        samples: dict[int, list[Sample]] = {}
        taken: dict[str, list[Sample]] = {}
        for member in list(self.members.values()):
            member.cursor = member.source.state()
            try:
                samples[member.slot] = take(member.source, member.run.train.batch_size, taken)
            except MantaError as e:
                self._end(member, "failed", str(e))
        return samples

    def _tell_step(self, member: Member, update: Mapping[str, float], seconds: float) -> None:
        course = member.course
        if course.step % member.standing.rhythm.log and course.steps_left:
            return
        values = {
            "step": course.step,
            "total": course.total,
            "loss": member.standing.metrics["loss"],
            **update,
            "tokens": member.standing.tokens,
            "skipped_steps": course.bad_steps,
            "seconds_per_step": seconds,
        }
        self._tell(member.trial, "step", values)

    def _evaluate(self) -> None:
        """All trials that are due, in shared passes."""
        due = {}
        for m in self.members.values():
            if m.data.eval and (not m.course.steps_left or m.course.step % m.standing.rhythm.eval == 0):
                due[m.slot] = m
        if not due:
            return
        held_out = {slot: m.data.eval for slot, m in due.items() if m.data.eval}
        try:
            found = self._within_memory(partial(self.evaluate, held_out))
        except OutOfMemoryError as e:
            if self.engine.ranks == 1:  # of several, the rank that lacked memory has told it
                self._shrink(len(self.members) - 1, str(e))
            raise
        for slot, member in due.items():
            member.standing.note(found[slot], member.course.step, partial(self.ground.bank.tensors, slot))
            best = member.standing.best.step
            self._tell(member.trial, "eval", {"step": member.course.step, **found[slot], "best_step": best})

    # -- memory -------------------------------------------------------------------------------------------------------

    def _train(self, samples: Mapping[int, Sequence[Sample]]) -> Callable[[], dict[int, float]] | None:
        """Gradients of all; trials that do not fit any more leave. None where none is left."""
        while self.members:
            steps = {m.slot: m.course.step for m in self.members.values()}
            mine = {slot: samples[slot] for slot in steps}
            do = partial(self.stepper.gradients, mine, steps)
            try:
                return self._within_memory(do)
            except OutOfMemoryError as e:
                if self.engine.ranks > 1:
                    raise
                self._put_back(str(e))
        return None

    def _put_back(self, reason: str) -> None:
        """The youngest trial waits for another slot; one that is alone will never fit."""
        member = list(self.members.values())[-1]
        assert member.cursor is not None
        member.source.load_state(member.cursor)
        if len(self.members) == 1:
            self._end(member, "failed", reason)
            return
        self._save(member)
        self._drop(member)
        self._tell(member.trial, "left", {"step": member.course.step, "reason": reason})
        self._shrink(len(self.members), reason)

    def _within_memory(self, do: Callable[[], T]) -> T:
        """Do it in smaller passes, where the device cannot hold larger ones.

        Raises:
            OutOfMemoryError: they are as small as they get; or there are several ranks, which have to start anew.
        """
        while True:
            try:
                return do()
            except torch.OutOfMemoryError as e:
                text = f"out of memory with {len(self.members)} trials and {self.stepper.tokens:,} tokens a pass: {e}"
            self.ground.bank.zero_grad()
            _free_memory(self.engine.device)
            small = self.stepper.tokens <= self.stepper.longest()
            tokens = self.stepper.tokens if small else max(self.stepper.longest(), self.stepper.tokens // 2)
            if self.engine.ranks > 1:
                self.reporter.shrink(max(1, len(self.members) - small), tokens)
                raise OutOfMemoryError(text)
            if small:
                raise OutOfMemoryError(text)
            self.stepper.tokens = tokens
            self._shrink(self.capacity, text)

    def _shrink(self, capacity: int, reason: str) -> None:
        self.capacity = max(1, capacity)
        if self.engine.rank == 0:
            self.reporter.shrink(self.capacity, self.stepper.tokens)
        text = f"{reason}; from now on {self.capacity} trials at once, {self.stepper.tokens:,} tokens a pass"
        self._tell("", "warning", {"text": text})

    def _tell(self, trial: str, kind: str, values: Mapping[str, Any]) -> None:
        if self.engine.rank == 0:
            self.reporter.tell(trial, kind, values)


def _free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
