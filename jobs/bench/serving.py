"""Throughput of the serving engine beside transformers' ``generate``, one request after the other.

``python jobs/bench/serving.py [--requests 32] [--tokens 64] [--deltas 4] [--rank 8] [--base demo] [--quantize none]``
prints one row per arrangement: base only, then mixed deltas, each with its ratio to ``generate`` on the bare base.
"""

import argparse
import random
import time

import torch

from orchestrator.base import load_base
from orchestrator.config import Base, Lora
from orchestrator.data.batch import NO_SLOT
from orchestrator.methods import Bank
from orchestrator.serve.engine import Engine
from orchestrator.serve.request import Request
from orchestrator.serve.sampling import Sampling


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("requests", 32), ("tokens", 64), ("deltas", 4), ("rank", 8), ("rows", 16), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--quantize", default="none", choices=["none", "int8", "nf4"])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(Base(id=args.base, quantize=args.quantize), device=device)
    drawn = random.Random(0)
    vocabulary = base.model.config.get_text_config().vocab_size
    prompts = [[drawn.randrange(5, vocabulary) for _ in range(drawn.randint(16, 96))] for _ in range(args.requests)]
    print(f"{args.base} ({args.quantize}) on {device}, {torch.get_num_threads()} threads: {args.requests} requests of")
    print(f"16-96 prompt tokens and {args.tokens} new ones, up to {args.rows} at once\n")

    began = time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=args.tokens,
            max_new_tokens=args.tokens,
            do_sample=False,
            use_cache=True,
        )
    one_by_one = args.requests * args.tokens / (time.perf_counter() - began)
    show("transformers generate, one after the other", one_by_one, one_by_one)

    bank = Bank(base.model, device=device)
    for slot in range(args.deltas):
        knobs = Lora(rank=args.rank, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
        bank.add(slot, knobs, seed=slot)
        values = {n: torch.randn_like(t) * 0.02 for n, t in bank.tensors(slot).items()}
        bank.remove(slot)
        bank.add(slot, knobs, tensors=values)
    engine = Engine(base.model, base.tokenizer, bank, rows=args.rows, length=1024, max_queued=args.requests)
    wish = Sampling(args.tokens, temperature=0, ignore_eos=True)
    for title, slots in (
        ("engine, base only", [NO_SLOT]),
        ("engine, one delta", [0]),
        (f"engine, base and {args.deltas} deltas mixed", [NO_SLOT, *range(args.deltas)]),
    ):
        work = [Request(prompt, wish, slots[i % len(slots)]) for i, prompt in enumerate(prompts)]
        began = time.perf_counter()
        for ticket in engine.submit(work):
            assert list(ticket)[-1].finish == "length"
        show(title, args.requests * args.tokens / (time.perf_counter() - began), one_by_one)
    engine.close()


def show(title: str, speed: float, baseline: float) -> None:
    print(f"{title:<44} {speed:>9.0f} tokens/s  {speed / baseline:>6.2f}x", flush=True)


if __name__ == "__main__":
    main()
