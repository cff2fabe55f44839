"""One GPU, an 8B-shaped NF4 base: tokens per second and memory of a run, beside peft + transformers.

    python jobs/bench/gpu.py --out jobs/bench/gpu.md

Every side runs in processes of its own, one after the other: the same random weights, start values and samples, LoRA
of rank 16 on all linear layers, AdamW; so their losses can be compared, too. Ours goes the way of jobs/train.py: Ray
Train, DeepSpeed where it shards, MLflow, checkpoints.
"""

import argparse
import json
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.config import Run

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}
SIDES = {
    "peft": "peft + transformers",
    "peft-liger": "peft + transformers + Liger kernels",
    "ours": "Manta, replicated (shard: 0)",
    "ours-zero3": "Manta, ZeRO-3 on one rank (shard: 3)",
    "ours-bf16": "Manta, on a bf16 base (quantize: none)",
}
SIZES = "4x2048,4x2048r,1x512"
SKIP = 5
LR = 1e-4


@dataclass(frozen=True)
class Size:
    """What one step sees."""

    rows: int
    length: int
    recompute: bool

    @classmethod
    def of(cls, text: str) -> "Size":
        """From ``4x2048``, or ``4x2048r`` with recomputation."""
        found = re.fullmatch(r"(\d+)x(\d+)(r?)", text)
        if found is None:
            raise SystemExit(f"{text} is not a size like 4x2048 or 4x2048r")
        return cls(int(found[1]), int(found[2]), bool(found[3]))

    @classmethod
    def title(cls, text: str) -> str:
        """For a table."""
        size = cls.of(text)
        return f"{size.rows} x {size.length}{', recompute' if size.recompute else ''}"


def main() -> None:
    args = _arguments()
    if args.side:
        _side(args)
        return
    rows = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log and args.log.exists() else []
    have = {(row["side"], row["size"]) for row in rows}
    with tempfile.TemporaryDirectory(prefix="manta-gpu-") as scratch:
        for side in args.sides.split(","):
            missing = [size for size in args.sizes.split(",") if (side, size) not in have]
            # A base of peft's side is made once for all sizes; a run of ours makes its own.
            for sizes in [[s] for s in missing] if side.startswith("ours") else [missing] * bool(missing):
                for row in _run_side(args, side, sizes, Path(scratch)):
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                if args.log:
                    args.log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = table(args, rows)
    print(text)
    if args.out:
        args.out.write_text(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--sizes", default=SIZES, help="rows x tokens of a step, r: with recomputation")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--sides", default=",".join(SIDES), help="which to run")
    parser.add_argument("--out", type=Path, help="markdown table to write")
    parser.add_argument("--log", type=Path, help="results so far; what is in it is not run again")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_side(args: argparse.Namespace, side: str, sizes: list[str], scratch: Path) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--side", side, "--scratch", str(scratch), "--shape", args.shape]
    command += ["--sizes", ",".join(sizes), "--steps", str(args.steps), "--device", args.device]
    done = subprocess.run(command, capture_output=True, text=True)
    result = scratch / "result.jsonl"
    rows = [json.loads(line) for line in result.read_text().splitlines()] if result.is_file() else []
    result.unlink(missing_ok=True)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-6000:], file=sys.stderr)
        why = (done.stderr.strip().splitlines() or ["?"])[-1][:200]
        rows += [{"size": size, "failed": why} for size in sizes if size not in {row["size"] for row in rows}]
    return [{"side": side, **row} for row in rows]


def _side(args: argparse.Namespace) -> None:
    """In a process of its own; what it finds goes into a file, size by size."""
    import torch

    measure: Callable[[argparse.Namespace, str], dict[str, Any]] = ours
    if not args.side.startswith("ours"):
        from gpu_peft import Theirs

        measure = Theirs(args).measure
    for size in args.sizes.split(","):
        try:
            found = measure(args, size)
        except (torch.OutOfMemoryError, MemoryError) as e:
            found = {"failed": str(e)[:200]}
        with (args.scratch / "result.jsonl").open("a") as results:
            results.write(json.dumps({"size": size, **found}) + "\n")


def base_folder(shape: str, scratch: Path) -> Path:
    """A model directory without weights: config and a tokenizer."""
    from transformers import LlamaConfig

    from orchestrator.base.files import DEMO

    folder = scratch / "base"
    if not folder.is_dir():
        LlamaConfig(**SHAPES[shape], pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
        for path in DEMO.glob("*token*"):
            shutil.copy(path, folder)
    return folder


def settings(args: argparse.Namespace, text: str) -> "Run":
    """The run of ours; peft's side reads base, data and start values off it."""
    from orchestrator.config.load import load_run

    size, folder = Size.of(text), base_folder(args.shape, args.scratch)
    data = args.scratch / f"data-{size.length}.jsonl"
    if not data.exists():
        draw = random.Random(0)
        words = ["many", "tuned", "adapters", "on", "one", "frozen", "base", "the", "order", "is", "late", "again"]
        lines = (json.dumps({"text": " ".join(draw.choices(words, k=2 * size.length))}) for _ in range(64))
        data.write_text("\n".join(lines))
    quantize = "none" if args.side == "ours-bf16" else "nf4"
    kernels = "auto" if args.device == "cuda" else "none"
    return load_run(
        None,
        [
            f"base={{id: {folder}, random_init: 0, kernels: {kernels}, quantize: {quantize}}}",
            f"data={{train: {data}, length: {size.length}, loss_on: all}}",
            f"shard={3 if args.side == 'ours-zero3' else 0}",
            f"train={{steps: {args.steps}, batch_size: {size.rows}, rows_per_pass: {size.rows}, lr: {LR}, warmup: 0.0, "
            f"schedule: constant, checkpoint_every: {args.steps}, recompute: {str(size.recompute).lower()}}}",
            f"cluster={{workers: 1, gpus_per_worker: {int(args.device == 'cuda')}, storage: {args.scratch}/storage}}",
            f"tracking={{uri: 'sqlite:///{args.scratch}/mlflow.db', system_metrics: false}}",
        ],
    )


def ours(args: argparse.Namespace, text: str) -> dict[str, Any]:
    """The way of jobs/train.py, with a listener."""
    from orchestrator.launch.train import train

    steps: list[dict[str, Any]] = []
    loaded: dict[str, Any] = {}

    def listen(kind: str, values: dict[str, Any]) -> None:
        if kind == "step":
            steps.append(values)
        if kind == "loaded":
            loaded.update(values)

    train(settings(args, text), listen=listen)
    return {
        "tokens_per_s": statistics.median(s["tokens_per_s"] for s in steps[SKIP:]),
        "gib": steps[-1]["memory_gib"],
        "base_gib": loaded["bytes_here"] / 2**30,
        "fused_kernels": loaded["fused_kernels"],
        "load_s": loaded["seconds"],
        "losses": [s["loss"] for s in steps],
    }


def linear_weights(shape: str) -> int:
    """Weights of the layers' linears."""
    s = SHAPES[shape]
    hidden, head = s["hidden_size"], s.get("head_dim", s["hidden_size"] // s["num_attention_heads"])
    attention = hidden * head * 2 * (s["num_attention_heads"] + s["num_key_value_heads"])
    return int(s["num_hidden_layers"] * (attention + 3 * hidden * s["intermediate_size"]))


def table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The rows as markdown, each as a ratio to plain peft of the same size."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU"
    at = [step for step in (1, 5, 10, 20) if step <= args.steps]
    fused = {row["fused_kernels"] for row in rows if "fused_kernels" in row}
    liger = {(): "would use", (True,): "use", (False,): "run WITHOUT"}.get(tuple(fused), "use, in part,")
    lines = [
        f"# One GPU: {args.shape}, NF4, LoRA r16 on all linear layers",
        "",
        f"{device}; torch {torch.__version__}, transformers {transformers.__version__}. Random weights; median of "
        f"steps {SKIP + 1} to {args.steps}; peak allocated memory; ratios to plain peft; TFLOP/s that are useful, 4 "
        f"FLOP for each weight of the linears and token. Manta's rows {liger} Liger's kernels. Made by `python "
        f"jobs/bench/gpu.py --shape {args.shape} --sizes {args.sizes} --steps {args.steps}`.",
    ]
    for size in args.sizes.split(","):
        lines += [
            "",
            f"## {Size.title(size)}",
            "",
            f"| | tokens/s | ratio | TFLOP/s | GiB | ratio | loss at step {', '.join(map(str, at))} |",
            "|---|---|---|---|---|---|---|",
        ]
        mine = {row["side"]: row for row in rows if row["size"] == size}
        plain = mine.get("peft", {})
        for row in [mine[side] for side in SIDES if side in mine]:
            if "failed" in row:
                lines.append(f"| {SIDES[row['side']]} | failed: {row['failed']} | | | | | |")
                continue
            speed = row["tokens_per_s"] / plain.get("tokens_per_s", float("nan"))
            space = row["gib"] / (plain.get("gib") or float("nan"))
            useful = 4e-12 * linear_weights(args.shape) * row["tokens_per_s"]
            losses = ", ".join(f"{row['losses'][step - 1]:.4f}" for step in at)
            lines.append(
                f"| {SIDES[row['side']]} | {row['tokens_per_s']:,.0f} | {speed:.2f} | {useful:.0f} | {row['gib']:.1f} "
                f"| {space:.2f} | {losses} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
