"""What a method costs by itself: tokens per second and peak memory of solo training on the encoder."""

import argparse
import statistics
import time
from typing import Any

import torch
from methods_pack import stepper_of
from methods_sets import SETS, bank_of, base_of
from methods_settings import SETTINGS

from orchestrator.base import load_base
from orchestrator.base.model import bare
from orchestrator.config import Classification, Train
from orchestrator.data import Sample
from orchestrator.methods import Bank
from orchestrator.train.classify import Classifier
from orchestrator.train.packed_adamw import PackedAdamW

STEPS = 20
SKIP = 5
TEXTS, TOKENS = 32, 128


def cost(args: argparse.Namespace, log: Any, names: list[str]) -> None:
    """One after the other on one loaded base: 32 texts of 128 tokens a step."""
    torch.set_float32_matmul_precision("high")
    task = Classification(labels=("no", "yes"), pooling="mean")
    base = load_base(base_of(args, "sst2"), device=args.device, encoder=True)
    model = bare(base.model)
    for name in names:
        if (name, None, None) in log.done:
            continue
        bank = bank_of(base, args.device)
        bank.add(0, SETTINGS[name].knobs, task=task)
        log.write({"setting": name, **_measure(args, model, bank, base.tokenizer.pad_token_id)})
        bank.detach()


def _measure(args: argparse.Namespace, model: Any, bank: Bank, pad_id: int) -> dict[str, float]:
    loss = Classifier(bank, encoder=True, packed=True)
    stepper = stepper_of(bank, model, loss, length=SETS["sst2"].length, pad_id=pad_id, tokens=args.tokens)
    optimizer = PackedAdamW(bank)
    optimizer.join(0, Train(lr=1e-4), STEPS)
    draw = torch.Generator().manual_seed(0)
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(STEPS):
        texts = [
            Sample(torch.randint(1000, 20000, (TOKENS,), generator=draw).tolist(), [False] * TOKENS, n, n % 2)
            for n in range(TEXTS)
        ]
        begin = time.perf_counter()
        stepper.gradients({0: texts}, {0: step})
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {
        "tokens_per_s": TEXTS * TOKENS / statistics.median(seconds[SKIP:]),
        "mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0,
    }
