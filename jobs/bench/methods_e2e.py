"""Judging generation: dev loss of every trial, and BLEU of each setting at its best learning rate."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from methods_pack import stepper_of
from methods_sets import Set, size_of, trained
from methods_settings import Trial

from orchestrator.base.load import FrozenBase
from orchestrator.methods import Bank
from orchestrator.serve.engine import Engine
from orchestrator.serve.request import Request
from orchestrator.serve.sampling import Sampling
from orchestrator.train.loss import plain_loss

ANSWER = 128
"""Most tokens of an answer."""
DEV = 500
"""Records of the dev split that the learning rate is chosen on."""


def judge(held: Any, chosen: Set, sets: Any, asked: Sequence[Trial], log: Any, seconds: float) -> None:
    """Log every trial; the best of each setting answers the test prompts greedily, all in one batch."""
    model, bank, base, args = held
    data = next(iter(sets.values()))
    dev = list(data.eval)[:DEV]
    pad_id = base.tokenizer.pad_token_id
    stepper = stepper_of(bank, model, plain_loss, length=chosen.length, pad_id=pad_id, tokens=args.tokens)
    found = stepper.evaluate(dict.fromkeys(bank.slots, dev))
    dev_loss = {slot: metrics["eval_loss"] for slot, metrics in found.items()}
    best: dict[str, int] = {}
    for slot, trial in enumerate(asked):
        if trial.setting not in best or dev_loss[slot] < dev_loss[best[trial.setting]]:
            best[trial.setting] = slot
    scores = _bleu(model, bank, base, args, best)
    sizes = {asked[slot].setting: size_of(bank, asked[slot], slot, data.task, base) for slot in best.values()}
    for slot, trial in enumerate(asked):
        log.add(
            trial,
            dev=-dev_loss[slot],
            **({"bleu": scores[slot][0], "answers": scores[slot][1]} if slot in scores else {}),
            parameters=trained(bank, slot),
            base=int(base.report.parameters),
            bytes=sizes[trial.setting],
            seconds=seconds,
            trials=len(asked),
        )


def _bleu(
    model: Any, bank: Bank, base: FrozenBase, args: argparse.Namespace, best: dict[str, int]
) -> dict[int, tuple[float, list[str]]]:
    """BLEU against all references (sacrebleu), and the first answers, of each slot."""
    import sacrebleu

    records = [json.loads(line) for line in (args.data / "e2e_nlg/test_grouped.jsonl").read_text().splitlines()]
    prompts = [
        base.tokenizer.apply_chat_template(
            [{"role": "user", "content": r["prompt"]}], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        for r in records
    ]
    count = sum(len(prompts) for _ in best)
    engine = Engine(
        model, base.tokenizer, bank, rows=256 if args.device == "cuda" else 64, max_queued=count, length=512
    )
    tickets = {
        slot: engine.submit([Request(p, Sampling(max_tokens=ANSWER, temperature=0.0), slot=slot) for p in prompts])
        for slot in best.values()
    }
    width = max(len(r["references"]) for r in records)
    references = [[r["references"][i] if i < len(r["references"]) else None for r in records] for i in range(width)]
    found = {}
    for slot, mine in tickets.items():
        answers = ["".join(event.text for event in ticket).strip() for ticket in mine]
        found[slot] = (sacrebleu.corpus_bleu(answers, references).score, answers[:3])
    engine.close()
    return found
