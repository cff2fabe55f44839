"""Every case alone, and in mixed packs of four, one after the other on one base; run by test_contract_ranks.py."""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.base import load_base
from orchestrator.config import Base, Train, Zero
from orchestrator.data import Sample
from orchestrator.methods import method_of
from orchestrator.train.engine import Engine
from orchestrator.train.loss import causal_lm_loss, plain_loss
from orchestrator.train.step import Layout, Stepper
from orchestrator.train.trial import Trial
from tests.methods_kit import CASES, bank_of, packable

STEPS = 3


def groups() -> list[list[str]]:
    """Packs of four that hold every packable case once; the last is filled up from the first."""
    names = list(packable())
    names += names[: -len(names) % 4]
    return [names[i : i + 4] for i in range(0, len(names), 4)]


def samples(case: str, step: int) -> list[Sample]:
    """What a case reads at one of its steps: as many and as long as its own draw says."""
    draw = random.Random(f"{case}/{step}")
    made = []
    for index in range(draw.randint(2, 4)):
        size = draw.randint(4, 24)
        made.append(Sample([draw.randrange(3, 320) for _ in range(size)], [True] * size, key=step * 100 + index))
    return made


def run(model: Any, engine: Engine, cases: list[str], source: Any) -> dict[str, Any]:
    """Train the cases side by side; losses and, at the end, sums of what is trained."""
    bank = bank_of(model, source)
    trials = {}
    for slot, case in enumerate(cases):
        bank.add(slot, CASES[case], seed=len(case))
        engine.broadcast(list(bank.windows(slot).values()), rank=0)
        trials[slot] = Trial(bank, engine, slot, Train(lr=0.01, warmup=0.0), total=STEPS)
    loss = plain_loss if any(bank.changes_head(slot) for slot in trials) else causal_lm_loss
    stepper = Stepper(model, bank, engine, loss, Layout(length=48, rows_per_pass=2, packing=True, pad_id=0))
    losses: dict[str, list[float]] = {case: [] for case in cases}
    for step in range(STEPS):
        got = stepper.train({s: samples(cases[s], step) for s in trials}, dict.fromkeys(trials, step))
        for slot, trial in trials.items():
            losses[cases[slot]].append(got[slot])
            trial.update()
    norms = {c: {n: float(p.detach().norm()) for n, p in bank.parameters(s).items()} for s, c in enumerate(cases)}
    bank.detach()
    return {"losses": losses, "norms": norms}


def main(out: str, base: str, quantize: str, stage: int, mixed_only: bool = False) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=ranks)
    engine = Engine(
        Zero(stage=stage, persistence_threshold=10), stage=stage, device=torch.device("cpu"), dtype=torch.float32
    )
    loaded = load_base(Base(id=base, quantize=quantize), sharder=engine.sharder)
    model = engine.start(loaded.model)
    alone = [[case] for case, knobs in CASES.items() if quantize == "none" or method_of(knobs).packs]
    report = {}
    for cases in [*([] if mixed_only else alone), *groups()]:
        report["+".join(cases)] = run(model, engine, cases, loaded.source)
    Path(out, f"{rank}.json").write_text(json.dumps(report))
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
