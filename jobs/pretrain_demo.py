"""Pretrain the demo base: a small Llama with its own tokenizer, on text that a grammar writes.

    PYTHONPATH=. python jobs/pretrain_demo.py --out orchestrator/assets/demo          # one GPU, under ten minutes
    PYTHONPATH=. python jobs/pretrain_demo.py --out out/smoke --cpu-smoke              # a few seconds on a CPU
    PYTHONPATH=. python jobs/pretrain_demo.py --eval orchestrator/assets/demo          # judge a finished one

Needs torch, transformers, tokenizers, safetensors and numpy alone. Writes weights (bf16), config, tokenizer, chat
template and a model card that holds the figures of this very run. Shapes: N rows, B rows of a batch, T tokens.
"""

import argparse
import math
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_card import TEMPLATE, card
from demo_eval import Outcome, evaluate
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from orchestrator.data.demo_text import document

SPECIAL = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAD, END_OF_TEXT, IM_END = 0, 1, 3
LONG = 2  # rows joined into one for the last tenth of the run: the longest context is LONG times --length
SHARD = 500  # rows that one task of the pool writes


def main() -> None:
    """Generate, train, write, evaluate."""
    args = _arguments()
    if args.eval:
        _report(args.eval, args)
        return
    begin = time.perf_counter()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args)
    tokenizer.save_pretrained(args.out)
    rows_NT = generate(args)
    generated = time.perf_counter() - begin
    model = build(args)
    figures = train(model, rows_NT, args, begin)
    save(model, args.out)
    figures |= {"generated": f"{generated:.0f}", "seconds": f"{time.perf_counter() - begin:.0f}"}
    outcome = _report(args.out, args)
    (args.out / "README.md").write_text(card(figures, outcome, args.eval_steps), encoding="utf-8")
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB in {time.perf_counter() - begin:.0f} s", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--eval", type=Path, help="only evaluate the base in this folder")
    parser.add_argument("--cpu-smoke", action="store_true", help="a few tiny steps on the CPU: does it run?")
    parser.add_argument("--seed", type=int, default=0)
    model = parser.add_argument_group("model")
    model.add_argument("--hidden", type=int, default=256)
    model.add_argument("--layers", type=int, default=6)
    model.add_argument("--heads", type=int, default=4)
    model.add_argument("--kv-heads", type=int, default=2)
    model.add_argument("--intermediate", type=int, default=640)
    model.add_argument("--vocab", type=int, default=2048)
    run = parser.add_argument_group("training")
    run.add_argument("--tokens", type=float, default=3e8, help="tokens to generate (default: %(default)g)")
    run.add_argument("--steps", type=int, default=40_000, help="optimizer steps at most")
    run.add_argument(
        "--budget", type=float, default=300, help="seconds of training; the schedule ends at whichever is first"
    )
    run.add_argument("--rows", type=int, default=64, help="rows of one step")
    run.add_argument("--length", type=int, default=1024, help="tokens of one row")
    run.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    run.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that write text")
    run.add_argument("--no-compile", action="store_true", help="do not use torch.compile on a GPU")
    judge = parser.add_argument_group("evaluation")
    judge.add_argument("--eval-steps", type=int, default=80, help="LoRA steps of 16 samples")
    judge.add_argument(
        "--eval-rates", type=float, nargs="+", default=[5e-3], help="LoRA learning rates; the best counts"
    )
    judge.add_argument("--eval-records", type=int, default=200, help="held-out records")
    judge.add_argument(
        "--eval-dense", action="store_true", help="judge on the dense base instead of NF4-rounded weights"
    )
    judge.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.cpu_smoke:
        args.device, args.tokens, args.rows, args.length = "cpu", 4e5, 8, 256
        args.steps, args.eval_steps, args.eval_records = min(args.steps, 20), 3, 8
    return args


def train_tokenizer(args: argparse.Namespace) -> Any:
    """Byte-level BPE of ``--vocab`` entries, trained on the generated text; every digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(args.seed)  # noqa: S311 (no secret)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document(rng) for _ in range(2_000 if args.cpu_smoke else 40_000))
    bpe.train_from_iterator((part for text in texts for part in _without(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",  # noqa: S106 (a token, no password)
        pad_token="<|pad|>",  # noqa: S106
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        model_max_length=args.length * LONG,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _without(text: str) -> list[str]:
    """The parts of ``text`` between special tokens."""
    for mark in SPECIAL:
        text = text.replace(mark, "\0")
    return [part for part in text.split("\0") if part]


def _write_rows(seed: int, path: str, length: int, rows: int) -> NDArray[np.uint16]:
    """``rows`` rows of whole documents, each row starting with a new one; the last one of a row is cut off."""
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(path)
    rng = random.Random(seed)  # noqa: S311 (no secret)
    out_NT = np.empty((rows, length), dtype=np.uint16)
    row: list[int] = []
    filled = 0
    while filled < rows:
        for encoding in bpe.encode_batch([document(rng) for _ in range(64)], add_special_tokens=False):
            row += encoding.ids
            row.append(END_OF_TEXT)
            if len(row) >= length and filled < rows:
                out_NT[filled] = row[:length]
                filled += 1
                row = []
    return out_NT


def generate(args: argparse.Namespace) -> NDArray[np.uint16]:
    """The training text as token rows [N, T], written by ``--workers`` processes; the same for the same seed."""
    begin = time.perf_counter()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    wanted = max(args.rows * LONG, int(args.tokens) // args.length)
    shards = -(-wanted // SHARD)
    task = partial(_write_rows, path=str(args.out / "tokenizer.json"), length=args.length, rows=min(SHARD, wanted))
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        rows_NT = np.concatenate(pool.map(task, range(args.seed * 1_000_000, args.seed * 1_000_000 + shards), 1))
    seconds = time.perf_counter() - begin
    print(f"wrote {rows_NT.size / 1e6:.0f}M tokens in {seconds:.0f} s with {args.workers} processes", flush=True)
    return rows_NT


def build(args: argparse.Namespace) -> Any:
    """The model, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.length * LONG,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IM_END,
        pad_token_id=PAD,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    return model


def train(model: Any, rows_NT: NDArray[np.uint16], args: argparse.Namespace, begin: float) -> dict[str, str]:
    """Next-token prediction in bf16 with AdamW and a cosine; returns the figures for the model card."""
    cuda = args.device == "cuda"
    data_NT = torch.from_numpy(rows_NT.astype(np.int16)).to(args.device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=cuda)

    def loss_of(tokens_BT: Tensor) -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=cuda):
            logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), tokens_BT[:, 1:].flatten())

    step_loss = _compiled(loss_of, data_NT[: args.rows].long(), LONG) if cuda and not args.no_compile else loss_of
    model.zero_grad(set_to_none=True)
    started, seen, step, progress = time.perf_counter(), 0, 0, 0.0
    order = torch.randperm(len(data_NT), device=args.device)
    at, epochs, recent = 0, 0, torch.zeros((), device=args.device)
    while step < args.steps and progress < 1.0:
        if at + args.rows > len(order):
            order, at, epochs = torch.randperm(len(data_NT), device=args.device), 0, epochs + 1
        progress = max(step / args.steps, (time.perf_counter() - started) / args.budget)
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
            group["lr"] = args.rate * min(1.0, (step + 1) / 300) * (0.02 + 0.98 * cosine)
        tokens_BT = data_NT[order[at : at + args.rows]].long()
        if progress > 0.9:
            tokens_BT = tokens_BT.reshape(-1, args.length * LONG)
        at += args.rows
        loss = step_loss(tokens_BT)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen, step = seen + tokens_BT.numel(), step + 1
        recent = loss.detach() if step == 1 else 0.98 * recent + 0.02 * loss.detach()
        if step in (1, 10, 100) or step % 500 == 0 or step == args.steps:
            spent = time.perf_counter() - started
            speed, rate = f"{seen / spent / 1e6:.2f}M tok/s  {spent:.0f} s", optimizer.param_groups[0]["lr"]
            means = f"loss {loss.item():.4f}  mean {recent.item():.4f}"
            print(f"step {step:6d}  {progress:4.0%}  {means}  lr {rate:.2e}  {speed}", flush=True)
    spent = time.perf_counter() - started
    print(
        f"trained {step} steps, {seen / 1e6:.0f}M tokens, {epochs + 1} epochs, loss {recent.item():.4f}, {spent:.0f} s"
    )
    device = torch.cuda.get_device_name() if cuda else platform.processor() or "CPU"
    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "vocab": str(args.vocab),
        "shape": f"{args.layers} layers, hidden {args.hidden}, {args.heads} heads ({args.kv_heads} key-value), MLP "
        f"{args.intermediate}",
        "context": str(args.length * LONG),
        "text": f"{rows_NT.size / 1e6:.0f}M",
        "tokens": f"{seen / 1e6:.0f}M",
        "steps": f"{step:,}",
        "rows": str(args.rows),
        "length": str(args.length),
        "rate": f"{args.rate:g}",
        "seed": str(args.seed),
        "loss": f"{recent.item():.3f}",
        "trained": f"{spent:.0f}",
        "device": device,
    }


def _compiled(loss_of: Callable[[Tensor], Tensor], tokens_BT: Tensor, join: int) -> Callable[[Tensor], Tensor]:
    """``loss_of`` compiled for both row lengths ahead of the clock; as it is, and said so, where that fails."""
    begin = time.perf_counter()
    compiled: Callable[[Tensor], Tensor] = torch.compile(loss_of, dynamic=False)
    try:
        for shape in (tokens_BT.shape, (-1, tokens_BT.shape[1] * join)):
            torch.autograd.backward(compiled(tokens_BT.reshape(shape)))
    except (RuntimeError, OSError) as error:  # no compiler or no Triton on this machine
        print(f"torch.compile does not work here, training without it: {str(error)[:300]}", flush=True)
        return loss_of
    torch.cuda.synchronize()
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    return compiled


def save(model: Any, out: Path) -> None:
    """Weights in bf16, config and generation config."""
    from transformers import GenerationConfig

    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[IM_END, END_OF_TEXT], pad_token_id=PAD, do_sample=False, max_new_tokens=128
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for its owner alone


def _report(path: Path, args: argparse.Namespace) -> Outcome:
    """Evaluate at every rate, print, and return the best outcome."""
    best: Outcome | None = None
    for i, rate in enumerate(args.eval_rates):
        outcome = evaluate(
            str(path),
            device=args.device,
            steps=args.eval_steps,
            rate=rate,
            held_out=args.eval_records,
            nf4=not args.eval_dense,
            seed=args.seed,
            show=3 if i == 0 else 0,
        )
        match = f"exact match {outcome.bare:.1%} bare, {outcome.tuned:.1%} tuned, loss {outcome.loss:.4f}"
        print(f"  {args.eval_steps} LoRA steps at {rate:g}: {match}, {outcome.seconds:.0f} s", flush=True)
        best = outcome if best is None or outcome.tuned > best.tuned else best
    assert best is not None
    return best


if __name__ == "__main__":
    main()
