"""One GPU, an 8B-shaped NF4 base: tokens per second and memory of a run, beside peft + transformers.

    python jobs/bench/gpu.py --out jobs/bench/gpu.md

Every side runs in a process of its own, one after the other, on the same random weights, at the same shape: rows x
2048 tokens, LoRA of rank 16 on all linear layers, AdamW. Ours goes the way of jobs/train.py: Ray Train, DeepSpeed
where it shards, MLflow, checkpoints.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIDES = {
    "peft": "peft + transformers",
    "peft-liger": "peft + transformers + Liger kernels",
    "ours": "Manta, replicated (shard: 0)",
    "ours-zero3": "Manta, ZeRO-3 on one rank (shard: 3)",
}
SKIP = 5


def main() -> None:
    args = _arguments()
    if args.side:
        _write(args, ours(args) if args.side.startswith("ours") else theirs(args))
        return
    rows = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log and args.log.exists() else []
    have = {(row["side"], row["recompute"]) for row in rows}
    with tempfile.TemporaryDirectory(prefix="manta-gpu-") as scratch:
        for recompute in (False, True):
            for side in [s for s in args.sides.split(",") if (s, recompute) not in have]:
                rows.append(_run_side(args, side, recompute, Path(scratch)))
                print(json.dumps(rows[-1]), flush=True)
                if args.log:
                    args.log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = table(args, rows)
    print(text)
    if args.out:
        args.out.write_text(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--sides", default=",".join(SIDES), help="which to run")
    parser.add_argument("--out", type=Path, help="markdown table to write")
    parser.add_argument("--log", type=Path, help="results so far; what is in it is not run again")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_side(args: argparse.Namespace, side: str, recompute: bool, scratch: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--scratch", str(scratch), "--shape", args.shape]
    command += ["--rows", str(args.rows), "--length", str(args.length), "--steps", str(args.steps)]
    command += ["--device", args.device, *(["--recompute"] if recompute else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    result = scratch / "result.json"
    if done.returncode or not result.is_file():
        print(done.stdout[-3000:], done.stderr[-6000:], file=sys.stderr)
        return {"side": side, "recompute": recompute, "failed": (done.stderr.strip().splitlines() or ["?"])[-1][:200]}
    values = json.loads(result.read_text())
    result.unlink()
    return {"side": side, "recompute": recompute, **values}


def _write(args: argparse.Namespace, values: dict[str, Any]) -> None:
    (args.scratch / "result.json").write_text(json.dumps(values))


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


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """The way of jobs/train.py, with a listener."""
    from orchestrator.config.load import load_run
    from orchestrator.launch.train import train

    folder = base_folder(args.shape, args.scratch)
    data = args.scratch / "data.jsonl"
    line = json.dumps({"text": "many tuned adapters on one frozen base " * (args.length // 4)})
    data.write_text("\n".join([line] * max(64, args.rows)))
    run = load_run(
        None,
        [
            f"base={{id: {folder}, random_init: 0, kernels: {'auto' if args.device == 'cuda' else 'none'}}}",
            f"data={{train: {data}, length: {args.length}, loss_on: all}}",
            f"shard={3 if args.side == 'ours-zero3' else 0}",
            f"train={{steps: {args.steps}, batch_size: {args.rows}, rows_per_pass: {args.rows}, lr: 1.0e-4, "
            f"checkpoint_every: {args.steps}, recompute: {str(args.recompute).lower()}}}",
            f"cluster={{workers: 1, gpus_per_worker: {int(args.device == 'cuda')}, storage: {args.scratch}/storage}}",
            f"tracking={{uri: 'sqlite:///{args.scratch}/mlflow.db', system_metrics: false}}",
        ],
    )
    steps: list[dict[str, Any]] = []
    loaded: dict[str, Any] = {}

    def listen(kind: str, values: dict[str, Any]) -> None:
        if kind == "step":
            steps.append(values)
        if kind == "loaded":
            loaded.update(values)

    train(run, listen=listen)
    return {
        "tokens_per_s": statistics.median(s["tokens_per_s"] for s in steps[SKIP:]),
        "gib": steps[-1]["memory_gib"],
        "base_gib": loaded["bytes_here"] / 2**30,
        "load_s": loaded["seconds"],
        "loss": steps[-1]["loss"],
    }


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    """peft's LoRA on transformers' model with bitsandbytes' linears."""
    import time

    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base_folder(args.shape, args.scratch))
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                held = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
                held.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                layer.set_submodule(name, held.to(args.device))
    if args.side == "peft-liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.train()
    if args.recompute:
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=cuda)
    x_BT = torch.randint(3, config.vocab_size, (args.rows, args.length), device=args.device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        loss = model(input_ids=x_BT, labels=x_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        seconds.append(time.perf_counter() - begin)
    return {
        "tokens_per_s": x_BT.numel() / statistics.median(seconds[SKIP:]),
        "gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "loss": value,
    }


def table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The rows as markdown, each as a ratio to plain peft of the same mode."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU"
    lines = [
        f"# One GPU: {args.shape}, {args.rows} x {args.length} tokens, NF4, LoRA r16 on all linear layers",
        "",
        f"{device}; torch {torch.__version__}, transformers {transformers.__version__}. Random weights; median of "
        f"steps {SKIP + 1} to {args.steps}; peak allocated memory. Made by `python jobs/bench/gpu.py "
        f"--shape {args.shape} --rows {args.rows} --length {args.length} --steps {args.steps}`.",
        "",
        "| | recompute | tokens/s | ratio | GiB | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["recompute"], list(SIDES).index(r["side"]))):
        name, mode = SIDES[row["side"]], "yes" if row["recompute"] else "no"
        if "failed" in row:
            lines.append(f"| {name} | {mode} | failed: {row['failed']} | | | |")
            continue
        plain = next((r for r in rows if r["side"] == "peft" and r["recompute"] == row["recompute"]), row)
        speed = row["tokens_per_s"] / plain.get("tokens_per_s", float("nan"))
        space = row["gib"] / plain["gib"] if plain.get("gib") else float("nan")
        lines.append(f"| {name} | {mode} | {row['tokens_per_s']:,.0f} | {speed:.2f} | {row['gib']:.1f} | {space:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
