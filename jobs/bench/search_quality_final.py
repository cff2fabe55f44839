"""The last trainings of search_quality.py: every setting with every seed in one pack, each judged on the test split."""

import argparse
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from methods_sets import SETS, answered, bank_of, base_of
from search_quality import SEEDS, splits

from orchestrator.base import load_base
from orchestrator.base.model import bare
from orchestrator.config import Data, Run, Source
from orchestrator.data import prepare
from orchestrator.train.classify import Classifier
from orchestrator.train.engine import Engine
from orchestrator.train.packed_adamw import PackedAdamW
from orchestrator.train.step import Layout, Stepper


def final(args: argparse.Namespace, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Lines with each answer on the test split, one a setting and seed."""
    torch.set_float32_matmul_precision("high")
    chosen, (train, dev, test) = SETS[args.set], splits(args)
    base = load_base(base_of(args, args.set), device=args.device, encoder=True)
    bank = bank_of(base, args.device)
    length = Data(train=(Source(path=str(train)),), eval=(Source(path=str(dev)),), length=chosen.length)
    sets = {seed: prepare(length, base.tokenizer, seed=seed, task=chosen.task) for seed in SEEDS}
    task = sets[SEEDS[0]].task
    judged = Data(train=length.train, eval=(Source(path=str(test)),), length=chosen.length)
    texts = list(prepare(judged, base.tokenizer, seed=0, task=task).eval or [])
    engine = Engine(Run().cluster.zero, stage=0, device=torch.device(args.device), dtype=torch.float32)
    layout = Layout(chosen.length, max(1, args.tokens // chosen.length), True, base.tokenizer.pad_token_id)
    model = bare(base.model)
    stepper = Stepper(model, bank, engine, Classifier(bank, encoder=True, packed=True), layout)
    optimizer = PackedAdamW(bank)
    jobs: dict[int, tuple[str, int, Run, Any]] = {}
    for name, values in settings.items():
        for seed in SEEDS:
            run, slot = Run.model_validate(values), len(jobs)
            data = prepare(length, base.tokenizer, seed=seed, task=chosen.task)  # each has a place in it of its own
            bank.add(slot, run.method, seed=seed, task=task)
            assert data.train.size is not None
            total = max(1, -(-round(run.train.epochs * data.train.size) // run.train.batch_size))
            optimizer.join(slot, run.train.model_copy(update={"lr": run.lr, "seed": seed}), total)
            jobs[slot] = (name, seed, run, data.train)
    lines, begin = [], time.monotonic()
    while optimizer.courses:
        samples = {slot: jobs[slot][3].take(jobs[slot][2].train.batch_size) for slot in optimizer.courses}
        stepper.train(samples, {slot: course.step for slot, course in optimizer.courses.items()})
        optimizer.step()
        for slot in [slot for slot, course in optimizer.courses.items() if not course.steps_left]:
            name, seed, run, _ = jobs[slot]
            right = answered(model, bank, slot, texts, base, args)
            lines.append(_line(name, seed, run, bank, slot, right))
            print(f"{name}, seed {seed}: {lines[-1]['test']:.4f}, {time.monotonic() - begin:.0f} s", flush=True)
            optimizer.leave(slot)
            bank.remove(slot)
    return {"lines": lines, "seconds": time.monotonic() - begin}


def _line(name: str, seed: int, run: Run, bank: Any, slot: int, right: "np.ndarray[Any, Any]") -> dict[str, Any]:
    return {
        "setting": name,
        "seed": seed,
        "method": run.method.model_dump(mode="json"),
        "lr": run.lr,
        "batch_size": run.train.batch_size,
        "parameters": sum(p.numel() for p in bank.parameters(slot).values()),
        "test": float(np.mean(right)),
        "right": np.packbits(right).tobytes().hex(),
        "count": len(right),
    }
