"""The sets of the methods bench: what is read, trained and judged."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods_pack import stepper_of
from methods_settings import Trial

from orchestrator.base import load_base
from orchestrator.base.load import FrozenBase
from orchestrator.base.model import bare
from orchestrator.config import Base, CausalLM, Classification, Data, Source, Task, Train
from orchestrator.data import Sample, prepare
from orchestrator.methods import Bank, to_files
from orchestrator.train.classify import Classifier, predict
from orchestrator.train.loss import plain_loss
from orchestrator.train.packed_adamw import PackedAdamW


@dataclass(frozen=True)
class Set:
    """One set."""

    task: Task
    train: str
    dev: str | None
    """None: a tenth of the training records."""
    test: str
    length: int
    batch_size: int
    epochs: float
    lr_factor: float = 1.0
    """The demo base is small and wants larger learning rates than the encoder."""


SETS = {
    "sst2": Set(Classification(pooling="mean"), "sst2/train_sentences", "sst2/dev", "sst2/test", 128, 32, 2),
    "banking77": Set(Classification(pooling="mean"), "banking77/train", None, "banking77/test", 128, 32, 4),
    "e2e": Set(CausalLM(), "e2e_nlg/train_10k", None, "e2e_nlg/test_grouped", 256, 16, 1, 2.0),
}


def base_of(args: argparse.Namespace, name: str) -> Base:
    """The frozen base of a set, in fp32."""
    return Base(id="demo" if name == "e2e" else str(args.encoder), quantize="none", precision="fp32", kernels="none")


def run(args: argparse.Namespace, name: str, asked: Sequence[Trial], log: Any) -> None:
    """Train all trials at once, judge each."""
    torch.set_float32_matmul_precision("high")
    chosen = SETS[name]
    encoder = isinstance(chosen.task, Classification)
    base = load_base(base_of(args, name), device=args.device, encoder=encoder)
    own = bare(base.model) if encoder else base.model
    sets = {seed: prepared(args, chosen, base.tokenizer, seed) for seed in {t.seed for t in asked}}
    any_set = next(iter(sets.values()))
    bank = bank_of(base, args.device)
    for slot, trial in enumerate(asked):
        bank.add(slot, trial.knobs, seed=trial.seed, task=any_set.task)
    steps = round((args.epochs or chosen.epochs) * any_set.train.size / chosen.batch_size)
    steps = min(steps, args.limit) if args.limit else steps
    loss: Any = Classifier(bank, encoder=True, packed=True) if encoder else plain_loss
    optimizer = PackedAdamW(bank)
    for slot, trial in enumerate(asked):
        optimizer.join(slot, Train(lr=trial.lr * chosen.lr_factor), steps)
    pad_id = base.tokenizer.pad_token_id
    stepper = stepper_of(bank, own, loss, length=chosen.length, pad_id=pad_id, tokens=args.tokens)
    begin = time.monotonic()
    for step in range(steps):
        read = {seed: data.train.take(chosen.batch_size) for seed, data in sets.items()}
        samples = {slot: read[trial.seed] for slot, trial in enumerate(asked)}
        losses = stepper.gradients(samples, dict.fromkeys(samples, step))
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            mean = sum(losses().values()) / len(asked)
            print(f"{name} step {step + 1}/{steps} mean loss {mean:.4f} {time.monotonic() - begin:.0f} s", flush=True)
    seconds = time.monotonic() - begin
    bare_lm = (own, bank, base, args)
    if encoder:
        _judge_classes(bare_lm, chosen, sets, asked, log, seconds)
    else:
        from methods_e2e import judge

        judge(bare_lm, chosen, sets, asked, log, seconds)


def bank_of(base: FrozenBase, device: str) -> Bank:
    """An empty bank on it."""
    encode = base.tokenizer.encode
    return Bank(
        base.model, device=device, source=base.source, encode=lambda text: encode(text, add_special_tokens=False)
    )


def prepared(args: argparse.Namespace, chosen: Set, tokenizer: Any, seed: int) -> Any:
    """Training samples in the seed's order; the dev split is the same for all seeds."""
    source = Source(path=str(args.data / f"{chosen.train}.jsonl"))
    if chosen.dev is not None:
        data = Data(train=(source,), eval=(Source(path=str(args.data / f"{chosen.dev}.jsonl")),), length=chosen.length)
        return prepare(data, tokenizer, seed=seed, task=chosen.task)
    train, dev = split(args, chosen)
    data = Data(train=(Source(path=str(train)),), eval=(Source(path=str(dev)),), length=chosen.length)
    return prepare(data, tokenizer, seed=seed, task=chosen.task)


def split(args: argparse.Namespace, chosen: Set) -> tuple[Path, Path]:
    """A tenth of the training records, drawn once, is the dev split."""
    lines = (args.data / f"{chosen.train}.jsonl").read_text().splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    held = set(order[: len(lines) // 10].tolist())
    stem = chosen.train.replace("/", "-")
    paths = (args.out / f"{stem}.train.jsonl", args.out / f"{stem}.dev.jsonl")
    for path, wanted in zip(paths, (False, True), strict=True):
        path.write_text("\n".join(line for n, line in enumerate(lines) if (n in held) == wanted) + "\n")
    return paths


def test_samples(args: argparse.Namespace, chosen: Set, tokenizer: Any, task: Task) -> list[Sample]:
    """The test set as samples."""
    data = Data(
        train=(Source(path=str(args.data / f"{chosen.train}.jsonl")),),
        eval=(Source(path=str(args.data / f"{chosen.test}.jsonl")),),
        length=chosen.length,
    )
    made = prepare(data, tokenizer, seed=0, task=task).eval
    assert made is not None
    return list(made)


def _judge_classes(held: Any, chosen: Set, sets: Any, asked: Sequence[Trial], log: Any, seconds: float) -> None:
    """Dev accuracy and the test set's answers of every trial."""
    model, bank, base, args = held
    data = next(iter(sets.values()))
    dev, test = list(data.eval), test_samples(args, chosen, base.tokenizer, data.task)
    sizes: dict[str, int] = {}
    for slot, trial in enumerate(asked):
        if trial.setting not in sizes:
            sizes[trial.setting] = size_of(bank, trial, slot, data.task, base)
        answers = {
            name: answered(model, bank, slot, samples, base, args) for name, samples in (("dev", dev), ("test", test))
        }
        log.add(
            trial,
            dev=float(np.mean(answers["dev"])),
            test=float(np.mean(answers["test"])),
            right=np.packbits(answers["test"]).tobytes().hex(),
            count=len(test),
            parameters=trained(bank, slot),
            base=int(base.report.parameters),
            bytes=sizes[trial.setting],
            seconds=seconds,
            trials=len(asked),
        )


def answered(
    model: Any, bank: Bank, slot: int, samples: list[Sample], base: FrozenBase, args: Any
) -> np.ndarray[Any, Any]:
    """Which samples a slot gets right."""
    classifier, pad_id = Classifier(bank, encoder=True, packed=True), base.tokenizer.pad_token_id
    stepper = stepper_of(bank, model, classifier, length=128, pad_id=pad_id, tokens=args.tokens)
    said = predict(stepper, classifier, slot, samples)
    return (said.predicted_N == said.label_N).numpy()


def trained(bank: Bank, slot: int) -> int:
    """Parameters of the method; the head, which all have, is not counted."""
    heads = ("score.", "classifier.")
    return sum(p.numel() for n, p in bank.parameters(slot).items() if not n.startswith(heads))


def size_of(bank: Bank, trial: Trial, slot: int, task: Task, base: FrozenBase) -> int:
    """Bytes of the delta's file."""
    files, _ = to_files(trial.knobs, task, bank.tensors(slot), bank.sites(slot), bank.scope)
    return sum(t.numel() * t.element_size() for t in files.values())
