"""A pack on real ranks: slots of unequal lengths, one that joins, one that leaves, one that turns to NaN.

Run by test_zero3.py, once a rank; writes what each trial saw.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.base import NF4Linear, load_base
from orchestrator.base.monitor import GatherWatch
from orchestrator.config import Base, Lora, Train, Zero
from orchestrator.data import Sample
from orchestrator.methods import Bank
from orchestrator.train.engine import Engine
from orchestrator.train.loss import causal_lm_loss
from orchestrator.train.step import Layout, Stepper
from orchestrator.train.trial import Trial

# slot: method, first step, last step, samples a step, longest sample
TRIALS: dict[int, tuple[Lora, int, int, int, int]] = {
    0: (Lora(rank=4, alpha=8), 0, 6, 3, 12),
    1: (Lora(rank=8, alpha=8, targets=("q_proj", "down_proj"), dropout=0.1), 0, 3, 5, 30),
    2: (Lora(rank=2, alpha=4, rslora=True), 2, 6, 1, 40),
    3: (Lora(rank=3, alpha=6), 1, 5, 2, 20),
}
NAN_SLOT, NAN_STEP = 3, 3


def samples(slot: int, step: int) -> list[Sample]:
    """What a trial reads at one of its own steps."""
    draw = random.Random(f"{slot}/{step}")
    _, _, _, count, longest = TRIALS[slot]
    made = []
    for index in range(count):
        size = draw.randint(4, longest)
        tokens = [draw.randrange(3, 320) for _ in range(size)]
        made.append(Sample(tokens, [draw.random() < 0.7 or i == size - 1 for i in range(size)], key=step * 100 + index))
    return made


def main(out: str, base: str, slots: list[int], stage: int, recompute: bool = False, quantize: str = "nf4") -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=ranks)
    engine = Engine(
        Zero(stage=stage, persistence_threshold=10), stage=stage, device=torch.device("cpu"), dtype=torch.float32
    )
    loaded = load_base(Base(id=base, quantize=quantize), sharder=engine.sharder)
    bank = Bank(loaded.model)
    model = engine.start(loaded.model)
    if recompute:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watch = GatherWatch(model)
    stepper = Stepper(model, bank, engine, causal_lm_loss, Layout(length=64, rows_per_pass=2, packing=True, pad_id=0))
    trials: dict[int, Trial] = {}
    losses: dict[int, list[float]] = {slot: [] for slot in slots}
    final: dict[int, dict[str, Any]] = {}
    alive: list[int] = []
    for step in range(7):
        for slot in [s for s in slots if TRIALS[s][1] == step]:
            bank.add(slot, TRIALS[slot][0], seed=slot)
            trials[slot] = Trial(bank, engine, slot, Train(lr=0.02, warmup=0.0), total=6)
        for slot in [s for s in trials if TRIALS[s][2] == step]:
            final[slot] = {n: t.tolist() for n, t in bank.tensors(slot).items()}
            bank.remove(slot)
            del trials[slot]
        if not trials:
            continue
        if step == NAN_STEP and NAN_SLOT in trials:
            next(iter(bank.parameters(NAN_SLOT).values())).data.fill_(float("nan"))
        got = stepper.train({s: samples(s, t.step) for s, t in trials.items()}, {s: t.step for s, t in trials.items()})
        for slot, trial in trials.items():
            losses[slot].append(got[slot])
            trial.update()
        assert stage < 3 or ranks == 1 or watch.gathered_bytes
        alive.append(watch.alive_bytes())
        watch.reset()
    packed = [m.weight for m in model.modules() if isinstance(m, NF4Linear)]
    held = sum(getattr(p, "ds_tensor", p).numel() for p in packed)
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in packed)
    report = {"losses": losses, "final": final, "alive": alive, "held": held, "whole": whole}
    Path(out, f"{rank}.json").write_text(json.dumps(report))
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
