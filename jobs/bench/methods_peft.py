"""The same trainings by peft and transformers alone: full fine-tuning, and each method that peft has too.

Same records in the same order, same rates, schedule, clipping and number of steps, same pooling and head; the start
values are peft's own. Each run is a process of its own, several at once: a small encoder leaves a GPU mostly idle.
"""

import argparse
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from methods_settings import SETTINGS, best_lr

AT_ONCE = 8


def beside_peft(args: argparse.Namespace, log: Any, name: str, names: list[str]) -> None:
    """Every seed of full fine-tuning and of peft's methods, at the learning rate that ours was best at."""
    ours = [json.loads(line) for line in (args.out / f"{name}.jsonl").read_text().splitlines()]
    wanted = [n for n in names if n == "full" or SETTINGS[n].peft]
    jobs = []
    for setting in wanted:
        mine = [v for v in ours if v["setting"] == setting]
        jobs += [(setting, best_lr(mine, setting), seed) for seed in sorted({v["seed"] for v in mine})]
    jobs = [job for job in jobs if job not in log.done]
    at_once = AT_ONCE if args.device == "cuda" else 1
    plain = {k: v for k, v in vars(args).items() if k not in ("part", "func")}
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(one, [plain] * len(jobs), [name] * len(jobs), jobs):
            log.write(line)
            print(line["setting"], line["lr"], line["seed"], f"{line['test']:.4f}", flush=True)


def one(options: dict[str, Any], name: str, job: tuple[str, float, int]) -> dict[str, Any]:
    """One run."""
    import torch
    from methods_sets import SETS, prepared, test_samples
    from transformers import AutoModel

    from orchestrator.base import load_tokenizer
    from orchestrator.config import Base

    torch.set_float32_matmul_precision("high")
    args, (setting, lr, seed) = argparse.Namespace(**options), job
    chosen = SETS[name]
    tokenizer = load_tokenizer(Base(id=str(args.encoder)))
    data = prepared(args, chosen, tokenizer, seed)
    torch.manual_seed(seed)
    encoder = AutoModel.from_pretrained(args.encoder, dtype=torch.float32, attn_implementation="sdpa").to(args.device)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the frozen base has none either
    head = torch.nn.Linear(encoder.config.hidden_size, len(data.task.labels)).to(args.device)
    torch.nn.init.zeros_(head.bias)
    if (kind := SETTINGS[setting].peft) is not None:
        encoder = wrapped(encoder, kind, SETTINGS[setting].knobs)
    own = [p for p in encoder.parameters() if p.requires_grad] + list(head.parameters())
    optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=0.0)
    steps = round((args.epochs or chosen.epochs) * data.train.size / chosen.batch_size)
    steps = min(steps, args.limit) if args.limit else steps
    warm = round(0.03 * steps)
    begin, tokens = time.monotonic(), 0
    for step in range(steps):
        samples = data.train.take(chosen.batch_size)
        loss = torch.nn.functional.cross_entropy(
            logits(encoder, head, samples, args.device), labels(samples, args.device)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        left = (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm)))) / 2
        optimizer.param_groups[0]["lr"] = lr * ((step + 1) / warm if step < warm else left)
        optimizer.step()
        tokens += sum(len(s.tokens) for s in samples)
    seconds = time.monotonic() - begin
    right = []
    test = test_samples(args, chosen, tokenizer, data.task)
    with torch.no_grad():
        for at in range(0, len(test), 128):
            part = test[at : at + 128]
            right.append(
                (logits(encoder, head, part, args.device).argmax(1) == labels(part, args.device)).cpu().numpy()
            )
    correct = np.concatenate(right)
    return {
        "setting": setting,
        "lr": lr,
        "seed": seed,
        "test": float(correct.mean()),
        "right": np.packbits(correct).tobytes().hex(),
        "count": len(correct),
        "parameters": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        "tokens_per_s": tokens / seconds,
    }


def wrapped(encoder: Any, kind: str, knobs: Any) -> Any:
    """The encoder with peft's own method."""
    from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model

    linears = [n for n, m in encoder.named_modules() if type(m).__name__ == "Linear" and n.startswith("encoder.layer")]
    if kind in ("LORA", "DORA"):
        config: Any = LoraConfig(
            r=knobs.rank, lora_alpha=knobs.alpha, target_modules=linears, use_dora=kind == "DORA", lora_dropout=0.0
        )
    elif kind == "IA3":
        ends = [n for n in linears if n.endswith(("output.dense",)) and "attention" not in n]
        config = IA3Config(
            target_modules=[n for n in linears if n.endswith((".key", ".value"))] + ends, feedforward_modules=ends
        )
    else:
        config = LNTuningConfig(target_modules=[n for n, _ in encoder.named_modules() if n.endswith("LayerNorm")])
    return get_peft_model(encoder, config)


def logits(encoder: Any, head: Any, samples: Any, device: str) -> Any:
    """Mean pooling and the head, one padded row a text."""
    import torch

    width = max(len(s.tokens) for s in samples)
    ids = torch.tensor([s.tokens + [0] * (width - len(s.tokens)) for s in samples], device=device)
    mask = torch.tensor([[1] * len(s.tokens) + [0] * (width - len(s.tokens)) for s in samples], device=device)
    h = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = (h * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return head(pooled)


def labels(samples: Any, device: str) -> Any:
    """Label numbers."""
    import torch

    return torch.tensor([s.label for s in samples], device=device)
