"""Memory of full fine-tuning, LoRA and QLoRA on one GPU, beside the theory of bytes per parameter.

    python jobs/bench/memory.py --out jobs/bench/memory.md

Every side runs in a process of its own on random weights. Full fine-tuning is plain transformers and torch's AdamW in
the usual recipe: weights and gradients in bf16, a master copy and two moments in fp32. LoRA and QLoRA are this
project's own parts (rank 16, all linear layers). What does not fit is computed, and marked so.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import SHAPES, base_folder
from gpu_profile import Size, parts_of, samples_of, set_recompute
from torch import nn

SIDES = {"full": "full fine-tuning", "lora": "LoRA on bf16", "qlora": "QLoRA (NF4)"}
SIZES = ("1x2048", "1x2048r", "4x2048", "4x2048r")
STEPS = 3
FULL_BYTES = 16
"""Weights 2, gradients 2, master copy 4, moments 8."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Half a byte a weight, a byte for each block of 64, four for each 256 of these."""


def main() -> None:
    args = _arguments()
    if args.side:
        found = full(args) if args.side == "full" else ours(args)
        (args.scratch / "result.json").write_text(json.dumps(found))
        return
    rows = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log and args.log.exists() else []
    have = {(row["shape"], row["side"]) for row in rows}
    with tempfile.TemporaryDirectory(prefix="manta-memory-") as scratch:
        for shape in args.shapes.split(","):
            for side in [s for s in args.sides.split(",") if (shape, s) not in have]:
                rows.append(_run_side(args, shape, side, Path(scratch)))
                print(json.dumps(rows[-1]), flush=True)
                if args.log:
                    args.log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = table(args, rows)
    print(text)
    if args.out:
        args.out.write_text(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--sizes", default=",".join(SIZES), help="rows x tokens of a step, r: with recomputation")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, help="markdown table to write")
    parser.add_argument("--log", type=Path, help="results so far; what is in it is not run again")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_side(args: argparse.Namespace, shape: str, side: str, scratch: Path) -> dict[str, Any]:
    folder = scratch / shape
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--side", side, "--shape", shape, "--scratch", str(folder)]
    command += ["--sizes", args.sizes, "--device", args.device]
    done = subprocess.run(command, capture_output=True, text=True)
    result = folder / "result.json"
    if done.returncode or not result.is_file():
        print(done.stdout[-3000:], done.stderr[-6000:], file=sys.stderr)
        return {"shape": shape, "side": side, "failed": (done.stderr.strip().splitlines() or ["?"])[-1][:200]}
    values = json.loads(result.read_text())
    result.unlink()
    return {"shape": shape, "side": side, **values}


# ---- counting


class _Meter:
    """Allocated bytes of a GPU; zero elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def held(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak_of(self, do: Callable[[], None]) -> int | None:
        """Highest allocation in a few steps; None where they do not fit."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(STEPS):
                do()
        except torch.OutOfMemoryError:
            return None
        return torch.cuda.max_memory_allocated() if self.cuda else 0


def _theory(model: Any) -> dict[str, int]:
    """Parameters, and how many of them are weights of the layers' linears."""
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "linears": sum(m.in_features * m.out_features for m in linears),
    }


def _config(args: argparse.Namespace) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base_folder(args.shape, args.scratch))


def _empty(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(args), dtype=torch.bfloat16)


# ---- sides


def full(args: argparse.Namespace) -> dict[str, Any]:
    """Plain transformers, every parameter trained; one optimizer a parameter, so that one fp32 gradient is alive."""
    from transformers import AutoModelForCausalLM

    device = torch.device(args.device)
    found: dict[str, Any] = {**_theory(_empty(args)), "held": None, "peaks": {}}
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 1.02 * FULL_BYTES * found["parameters"]:
        return found
    with device:
        model: Any = AutoModelForCausalLM.from_config(_config(args), dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    masters = {p: p.detach().float() for p in model.parameters()}
    optimizers = {p: torch.optim.AdamW([m], lr=1e-5, fused=device.type == "cuda") for p, m in masters.items()}
    meter = _Meter(device)

    def update() -> None:
        for parameter, master in masters.items():
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            optimizers[parameter].step()
            master.grad = None
            parameter.data.copy_(master)

    for text in args.sizes.split(","):
        size = Size.of(text)
        set_recompute(model, size.recompute)
        tokens_BT = torch.randint(3, model.config.vocab_size, (size.rows, size.length), device=device)

        def step(tokens_BT: torch.Tensor = tokens_BT) -> None:
            model.zero_grad(set_to_none=True)
            model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
            update()

        found["peaks"][text] = meter.peak_of(step)
        if found["peaks"][text] is not None:
            found["held"] = meter.held() - tokens_BT.numel() * 8
        else:
            model.zero_grad(set_to_none=True)
    return found


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """The parts of ``jobs/train.py`` on a bf16 or an NF4 base."""
    from orchestrator.base import load_base
    from orchestrator.config import Base

    device, quantize = torch.device(args.device), "nf4" if args.side == "qlora" else "none"
    folder = base_folder(args.shape, args.scratch)
    found: dict[str, Any] = {**_theory(_empty(args)), "held": None, "peaks": {}}
    model = load_base(Base(id=str(folder), random_init=0, quantize=quantize), device=device).model
    meter = _Meter(device)
    for text in args.sizes.split(","):
        size = Size.of(text)
        set_recompute(model, size.recompute)
        bank, stepper, trial = parts_of(model, device, size, fuse=device.type == "cuda")
        samples = samples_of(size, model.config.vocab_size)

        def step(stepper: Any = stepper, trial: Any = trial, samples: Any = samples) -> None:
            stepper.train({0: samples}, {0: trial.step})
            trial.update()

        found["peaks"][text] = meter.peak_of(step)
        if found["peaks"][text] is not None:
            found["held"] = meter.held()
        found["trained"] = sum(p.numel() for p in bank.parameters(0).values())
        bank.detach()
        del bank, stepper, trial, step
    return found


# ---- the table


def table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """Markdown: what is held beside the theory, peaks with activations, and how many times the weights that is."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU"
    sizes = args.sizes.split(",")
    lines = [
        "# Memory of one GPU: full fine-tuning, LoRA, QLoRA",
        "",
        f"{device}; torch {torch.__version__}. Llama shapes, random weights; allocated memory as torch counts. Held: "
        f"weights, gradients and optimizer after a step, without activations. Theory: {FULL_BYTES} bytes per parameter "
        f"for full fine-tuning, 2 for a bf16 base, {NF4_BYTES:.3f} for an NF4 one (its embeddings and head stay at 2), "
        f"and {FULL_BYTES} for each trained parameter of a LoRA. Peaks are with activations; beside each, how many "
        "times the weights in bf16 it is. Made by `python jobs/bench/memory.py`.",
        "",
        f"| shape | | parameters | held, GiB | bytes per parameter | theory | {' | '.join(_head(s) for s in sizes)} |",
        f"|---|---|---|---|---|---|{'---|' * len(sizes)}",
    ]
    for row in rows:
        name = f"| {row['shape']} | {SIDES[row['side']]} "
        if "failed" in row:
            lines.append(f"{name}| failed: {row['failed']} |{' |' * (len(sizes) + 3)}")
            continue
        count, theory = row["parameters"], _theory_bytes(row)
        held = row["held"] or theory * count
        mark = "" if row["held"] else " (formula)"
        peaks = " | ".join(_peak(row, size, count) for size in sizes)
        mine = f"{count / 1e9:.2f}e9 | {held / 2**30:.1f}{mark} | {held / count:.2f}{mark} | {theory:.2f}"
        lines.append(f"{name}| {mine} | {peaks} |")
    return "\n".join([*lines, "", *_claim(rows)]) + "\n"


def _head(size: str) -> str:
    return (
        f"peak {size.removesuffix('r').replace('x', ' x ')}{', recompute' if size.endswith('r') else ''}, GiB (times)"
    )


def _theory_bytes(row: dict[str, Any]) -> float:
    """Bytes per parameter of the base."""
    count, linears = int(row["parameters"]), int(row["linears"])
    if row["side"] == "full":
        return FULL_BYTES
    base = 2 * count if row["side"] == "lora" else NF4_BYTES * linears + 2 * (count - linears)
    return (base + FULL_BYTES * int(row["trained"])) / count


def _peak(row: dict[str, Any], size: str, count: int) -> str:
    peak = row["peaks"].get(size)
    return f"{peak / 2**30:.1f} ({peak / (2 * count):.1f})" if peak else "does not fit"


def _claim(rows: list[dict[str, Any]]) -> list[str]:
    found = [r for r in rows if r["side"] == "full" and "failed" not in r]
    times = [p / (2 * r["parameters"]) for r in found for p in r["peaks"].values() if p]
    if not times:
        return []
    return [
        "Full training is said to need 12 to 20 times the memory of the weights. By formula it holds 8 times the bf16 "
        f"weights; measured with activations, {min(times):.1f} to {max(times):.1f} times, by shape, batch and "
        "recomputation."
    ]


if __name__ == "__main__":
    main()
