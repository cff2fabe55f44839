"""Shapes through the parts of a real run on one GPU, for ``plan.py``: peak memory and time of a step."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu import base_folder

from orchestrator.base import load_base
from orchestrator.config import IA3, Base, BitFit, Bottleneck, Lora, Method, Norms, Sparse, Train, Zero
from orchestrator.data import Sample
from orchestrator.methods import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.graph import Graphs
from orchestrator.train.loss import causal_lm_loss
from orchestrator.train.packed_adamw import PackedAdamW
from orchestrator.train.step import Layout, Stepper
from orchestrator.train.trial import Trial

STEPS = 6
MIXED: tuple[Method, ...] = (
    Lora(),
    Lora(rank=8),
    Lora(dora=True),
    Bottleneck(),
    IA3(),
    BitFit(),
    Norms(),
    Sparse(choose="random"),
)


@dataclass(frozen=True)
class Case:
    """One shape."""

    shape: str
    slots: tuple[Method, ...]
    rows: int
    """Of each slot."""
    length: int
    recompute: bool = False
    packed: bool = False
    """Four samples in a row."""

    @property
    def name(self) -> str:
        """For the log and the table."""
        kind = "mixed" if self.slots == MIXED else "LoRA"
        pack = f"pack of {len(self.slots)} {kind}, " if len(self.slots) > 1 else ""
        more = (", recompute" if self.recompute else "") + (", four samples a row" if self.packed else "")
        return f"{self.shape} NF4, {pack}{self.rows} x {self.length}{more}"


def cases() -> list[Case]:
    """What is measured: under two minutes on an H100; packs of the 8B shape that need more than it has, recomputed."""
    one: tuple[Method, ...] = (Lora(),)
    out = []
    for shape in ("1b", "8b"):
        out += [Case(shape, one, 1, 512), Case(shape, one * 8, 1, 512)]
        out.append(Case(shape, one * 32, 1, 512, recompute=shape == "8b"))
        if shape == "1b":  # DoRA reads every weight on the CPU to start with: a minute at 8B
            out.append(Case(shape, MIXED, 1, 512))
        out += [Case(shape, one, 4, 2048, r, p) for r, p in ((False, False), (True, False), (False, True))]
    return out


def measure(log: Path, device: torch.device) -> None:
    """What the log lacks; a line for each case."""
    have = {json.loads(line)["case"] for line in log.read_text().splitlines()} if log.is_file() else set()
    for shape in ("1b", "8b"):
        wanted = [case for case in cases() if case.shape == shape and case.name not in have]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory(prefix="manta-plan-") as scratch:
            base = Base(id=str(base_folder(shape, Path(scratch))), random_init=0)
            model = load_base(base, device=device).model
        for case in wanted:
            found = {
                "case": case.name,
                "device": _name(device),
                "torch": torch.__version__,
                **_one(model, case, device),
            }
            with log.open("a") as lines:
                lines.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
        del model


def _one(model: Any, case: Case, device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    if case.recompute:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bank = Bank(model, device=device, fuse=cuda)
    train, seconds = Train(lr=1e-4, steps=1000), []
    try:
        for slot, knobs in enumerate(case.slots):
            bank.add(slot, knobs, seed=slot)
        rows = case.rows * len(case.slots)
        engine = Engine(Zero(), stage=0, device=device, dtype=torch.bfloat16, rows_per_pass=rows)
        graphs = None
        if cuda and len(case.slots) == 1 and not case.recompute:
            graphs = Graphs(model, bank, device=device, length=case.length, warn=print)
        layout = Layout(case.length, rows, case.packed, 0)
        stepper = Stepper(model, bank, engine, causal_lm_loss, layout, graphs)
        step = _step_of(stepper, train)
        samples = {slot: _samples(case, slot, model.config.vocab_size) for slot in bank.slots}
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS):
            begin = time.perf_counter()
            step(samples)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError as e:
        return {"failed": str(e)[:200]}
    finally:
        bank.detach()
        if case.recompute:
            model.gradient_checkpointing_disable()
            model.eval()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "allocated": peak,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
        "device_used": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] if cuda else 0,
        "seconds": statistics.median(seconds[-2:]),
    }


def _step_of(stepper: Stepper, train: Train) -> Callable[[dict[int, list[Sample]]], None]:
    """As a run trains one slot, and a pack several."""
    slots = stepper.bank.slots
    if len(slots) == 1:
        trial = Trial(stepper.bank, stepper.engine, slots[0], train, 1000)

        def alone(samples: dict[int, list[Sample]]) -> None:
            stepper.train(samples, {slots[0]: trial.step})
            trial.update()

        return alone
    optimizer = PackedAdamW(stepper.bank)
    for slot in slots:
        optimizer.join(slot, train, 1000)

    def together(samples: dict[int, list[Sample]]) -> None:
        stepper.gradients(samples, {slot: optimizer.courses[slot].step for slot in slots})
        optimizer.step()

    return together


def _samples(case: Case, slot: int, vocabulary: int) -> list[Sample]:
    """Random tokens, all of them targets."""
    pieces = 4 if case.packed else 1
    draw = torch.Generator().manual_seed(slot)
    tokens = torch.randint(3, vocabulary, (case.rows * pieces, case.length // pieces), generator=draw)
    return [Sample(row, [True] * len(row), key) for key, row in enumerate(tokens.tolist())]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def measure_all(log: Path, device: str) -> None:
    """See ``measure``."""
    measure(log, torch.device(device))
