"""Our side of pack.py: one slot as a run has it, and packs, in this process on one base."""

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu import LR, Size, linear_weights, settings
from pack import keep, timed, whole_size

from orchestrator.base import load_base, load_tokenizer
from orchestrator.config import IA3, BitFit, Bottleneck, Lora, Prompt, Train
from orchestrator.data import prepare
from orchestrator.methods import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.graph import Graphs
from orchestrator.train.loss import causal_lm_loss
from orchestrator.train.pack_step import PackStepper, Rows
from orchestrator.train.packed_adamw import PackedAdamW
from orchestrator.train.step import Layout, Stepper
from orchestrator.train.trial import Trial

MIXED: tuple[Any, ...] = (
    Lora(rank=8, alpha=16),
    Lora(rank=16, alpha=32),
    Lora(rank=64, alpha=64, targets=("q_proj", "v_proj")),
    Lora(rank=16, alpha=32, dora=True),
    Bottleneck(size=64),
    IA3(),
    BitFit(),
    Prompt(tokens=20),
)
LORA = Lora(rank=16, alpha=32)
TOTAL = 100_000
"""Steps of a schedule that nobody gets to the end of."""


class Ours:
    """A base and a bank, slots on it, and what a step of them takes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.cuda = args, args.device == "cuda"
        self.device = torch.device(args.device)
        run = settings(args, args.sizes.split(",")[0])
        self.tokenizer = load_tokenizer(run.base)
        base = load_base(run.base, device=self.device)
        self.model: Any = base.model
        encode = self.tokenizer.encode
        self.bank = Bank(
            self.model,
            device=self.device,
            source=base.source,
            encode=lambda text: encode(text, add_special_tokens=False),
            fuse=self.cuda,
        )
        dtype = torch.bfloat16 if self.cuda else torch.float32
        self.engine = Engine(run.cluster.zero, stage=0, device=self.device, dtype=dtype)
        self.train = Train(lr=LR, schedule="constant", warmup=0.0)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def fresh(self) -> None:
        """Count memory anew."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def gib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def fill(self, slots: int, methods: tuple[Any, ...]) -> float:
        """Fill slots that are empty; returns seconds for each."""
        begin, new = time.perf_counter(), [slot for slot in range(slots) if slot not in self.bank.slots]
        for slot in new:
            self.bank.add(slot, methods[slot % len(methods)], seed=slot)
        self.sync()
        return (time.perf_counter() - begin) / max(1, len(new))

    def source(self, text: str) -> Any:
        """Samples of one size, each as long as it may be."""
        return prepare(settings(self.args, text).data, self.tokenizer, seed=0).train

    def solo(self, text: str) -> Callable[[], Mapping[int, float]]:
        """A step of one slot, as a run does it: graphs where they serve."""
        size, source = Size.of(text), self.source(text)
        layout = Layout(size.length, size.rows, packing=True, pad_id=self.tokenizer.pad_token_id)
        graphs = Graphs.of(self.model, self.bank, self.device, size.length, Silent())
        stepper = Stepper(self.model, self.bank, self.engine, causal_lm_loss, layout, graphs)
        trial = Trial(self.bank, self.engine, 0, self.train, TOTAL)

        def step() -> Mapping[int, float]:
            losses = stepper.start({0: source.take(size.rows)}, {0: trial.step})
            trial.update()
            return losses()

        return step

    def packed(self, text: str) -> Callable[[], Mapping[int, float]]:
        """A step of all slots of the bank, as a pack does it."""
        size, source, slots = Size.of(text), self.source(text), self.bank.slots
        pad_id, tokens = self.tokenizer.pad_token_id, self.args.pass_tokens
        stepper = PackStepper(self.model, self.bank, self.engine, causal_lm_loss, tokens=tokens, pad_id=pad_id)
        stepper.rows = dict.fromkeys(slots, Rows(size.length, packing=True))
        optimizer = PackedAdamW(self.bank)
        for slot in slots:
            optimizer.join(slot, self.train, TOTAL)

        def step() -> Mapping[int, float]:
            steps = {slot: optimizer.courses[slot].step for slot in slots}
            losses = stepper.gradients({slot: source.take(size.rows) for slot in slots}, steps)
            optimizer.step()
            return losses()

        return step


class Silent:
    """Says what a run would warn of."""

    def event(self, kind: str, values: dict[str, Any]) -> None:
        print(kind, values, flush=True)

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        """None are kept."""

    def restored(self) -> Any:
        """Nothing to go on from."""
        return nullcontext(None)

    def stop_reason(self) -> str | None:
        """Never told."""
        return None

    def preempted(self) -> bool:
        """Never."""
        return False


def _row(args: argparse.Namespace, text: str, slots: int, seconds: float, count: int, gib: float) -> dict[str, Any]:
    size = Size.of(text)
    tokens = slots * size.rows * size.length / seconds
    useful = 4e-12 * linear_weights(args.shape) * tokens
    return {"size": text, "slots": slots, "step_s": seconds, "steps": count, "tokens_per_s": tokens, "tflops": useful,
            "gib": gib}  # fmt: skip


def ours(args: argparse.Namespace) -> None:
    """One slot, then ever larger packs, at every size."""
    side = Ours(args)
    join = side.fill(1, (LORA,))
    keep(args, {"what": "ready", "ready_at": time.time(), "join_s": join})
    for slots in (1, *map(int, args.slots.split(","))):
        join = side.fill(slots, (LORA,))
        for text in args.sizes.split(","):
            side.fresh()
            try:
                step: Any = side.solo(text) if slots == 1 else side.packed(text)
                seconds, count = timed(step, args.seconds, side.sync)
                row = {**_row(args, text, slots, seconds, count, side.gib), "join_s": join}
            except torch.OutOfMemoryError as error:
                row = {"size": text, "slots": slots, "oom": str(error)[:200]}
            keep(args, {"what": "solo" if slots == 1 else "packed", **row})
            step = None  # its graphs and moments go with it


def mixed(args: argparse.Namespace) -> None:
    """Packs of several methods."""
    side, text = Ours(args), whole_size(args)
    for slots in map(int, args.slots.split(",")):
        side.fill(slots, MIXED)
        side.fresh()
        try:
            seconds, count = timed(side.packed(text), args.seconds, side.sync)
            row = _row(args, text, slots, seconds, count, side.gib)
        except torch.OutOfMemoryError as error:
            row = {"size": text, "slots": slots, "oom": str(error)[:200]}
        keep(args, {"what": "mixed", **row})


def start(args: argparse.Namespace) -> None:
    """A run of its own, the way of jobs/train.py: what passes before its first step is over, and after its last."""
    from orchestrator.launch.train import train

    first: list[float] = []
    last: list[float] = []

    def listen(kind: str, values: dict[str, Any]) -> None:
        if kind == "step":
            first.extend([time.time()] * (not first))
            last[:] = [time.time()]

    train(settings(args, whole_size(args)), listen=listen)
    keep(args, {"what": "start", "ready_at": first[0], "after_s": time.time() - last[0]})


def whole(args: argparse.Namespace) -> None:
    """Trials of a number of steps in packs of half as many, from the start of the process to the last step's end."""
    side, text = Ours(args), whole_size(args)
    slots = int(args.slots.split(",")[1])
    ready = time.time()
    for _ in range(2):
        side.fill(slots, (LORA,))
        step = side.packed(text)
        for _ in range(args.whole_steps):
            step()
        side.sync()
        for slot in side.bank.slots:
            side.bank.remove(slot)
    keep(args, {"what": "whole", "size": text, "slots": slots, "trials": 2 * slots, "steps": args.whole_steps,
                "ready_at": ready, "ended_at": time.time()})  # fmt: skip
