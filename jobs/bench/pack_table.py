"""The tables of pack.py, from what its parts left."""

import argparse
import platform
from typing import Any

from gpu import Size, linear_weights
from pack import whole_size

from orchestrator.config.search import Scheduler

TRIALS = (16, 64)
EVALUATIONS = 10
"""Of a trial: ten, where its config is silent."""

Rows = list[dict[str, Any]]


class Found:
    """What was measured of one base."""

    def __init__(self, shape: str, rows: Rows) -> None:
        mine = [row for row in rows if row["part"].endswith(f"-{shape}")]
        self.shape = shape
        self.failed = [(row["part"], row["failed"]) for row in mine if "failed" in row]
        self.peft = {row["size"]: row for row in mine if row.get("what") == "peft"}
        self.solo = {row["size"]: row for row in mine if row.get("what") == "solo"}
        self.many = {row["size"]: row for row in mine if row.get("what") == "many"}
        self.packed = {(row["size"], row["slots"]): row for row in mine if row.get("what") == "packed"}
        self.mixed = {row["slots"]: row for row in mine if row.get("what") == "mixed"}
        ready = {row["part"].split("-")[0]: row for row in mine if row.get("what") == "ready"}
        self.peft_start = ready.get("peft", {}).get("startup_s")
        self.pack_start = ready.get("ours", {}).get("startup_s")
        self.join_s = max((row["join_s"] for row in self.packed.values() if row.get("join_s")), default=0.0)
        start = next((row for row in mine if row.get("what") == "start"), {})
        self.run_start = start.get("startup_s") and start["startup_s"] + start["after_s"]
        self.whole = next((row for row in mine if row.get("what") == "whole"), None)


def table(args: argparse.Namespace, rows: Rows) -> str:
    """All of it as markdown."""
    import peft
    import torch
    import transformers

    here = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    lines = [
        "# Packs: many trials on one GPU",
        "",
        f"{args.device_name or here}; torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}. NF4 bases with random weights; a trial is LoRA r16 on all linear layers, AdamW. "
        f"Tokens/s of all trials together, measured over {args.seconds:g} s or five steps, whichever is longer. "
        "TFLOP/s that are useful: 4 FLOP for each weight of the layers' linears and token. *Processes*: as many of "
        f"peft's as fit in the GPU's memory at once (at most {args.most}), sharing it by time slices; their GiB are "
        f"those of one times their number. Made by `python jobs/bench/pack.py{' --tiny' if args.tiny else ''}`.",
    ]
    for shape in args.shapes.split(","):
        found = Found(shape, rows)
        if not any((found.peft, found.solo, found.packed, found.failed)):
            continue
        lines += ["", f"## {shape}: {linear_weights(shape) / 1e9:.2f} billion weights in the layers' linears", ""]
        lines += [f"- {part} FAILED: {why}" for part, why in found.failed]
        for size in args.sizes.split(","):
            lines += _speed(args, found, size)
        lines += _mixed(args, found) + _starts(found) + _makespans(args, found) + _gains(args, found) + _whole(found)
    return "\n".join(lines) + "\n"


def _speed(args: argparse.Namespace, found: Found, size: str) -> list[str]:
    plain = found.peft.get(size, {}).get("tokens_per_s")
    sides = [("(a) peft, one by one", found.peft.get(size)), ("(b) ours, one by one", found.solo.get(size))]
    if many := found.many.get(size):
        sides.append((f"(c) peft, {many['processes']} processes", many))
    sides += [(f"(d) pack of {slots}", found.packed.get((size, slots))) for slots in _slots(args)]
    lines = [f"### {Size.title(size)} tokens a trial's step", "", "| | tokens/s | to (a) | to (c) | TFLOP/s | GiB |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in sides:
        if row is None:
            continue
        if "oom" in row:
            lines.append(f"| {name} | does not fit: {row['oom']} | | | | |")
            continue
        space = row.get("gib") or row.get("reserved_gib") or 0.0
        beside = found.many.get(size, {}).get("tokens_per_s")
        lines.append(
            f"| {name} | {row['tokens_per_s']:,.0f} | {_ratio(row['tokens_per_s'], plain)} | "
            f"{_ratio(row['tokens_per_s'], beside)} | {row['tflops']:.0f} | {space:.1f} |"
        )
    return [*lines, ""]


def _mixed(args: argparse.Namespace, found: Found) -> list[str]:
    if not found.mixed:
        return []
    size = whole_size(args)
    said = []
    for slots, row in found.mixed.items():
        if "oom" in row:
            said.append(f"{slots} slots do not fit")
            continue
        alike = found.packed.get((size, slots), {}).get("tokens_per_s")
        said.append(
            f"{slots} slots {row['tokens_per_s']:,.0f} tokens/s ({_ratio(row['tokens_per_s'], alike)} of LoRA alone, "
            f"{row['tflops']:.0f} TFLOP/s)"
        )
    what = "LoRA of three ranks, DoRA, bottleneck, IA3, BitFit and prompt together"
    return [f"Packs of mixed methods ({what}), {Size.title(size)}: {'; '.join(said)}.", ""]


def _starts(found: Found) -> list[str]:
    said = []
    if found.peft_start:
        said.append(f"a process of peft's {found.peft_start:.1f} s to its first step")
    if found.run_start:
        said.append(f"a run of ours {found.run_start:.1f} s before its first step and after its last (Ray, registry)")
    if found.pack_start:
        said.append(f"a pack {found.pack_start:.1f} s, and {found.join_s:.2f} s for each trial that joins")
    return [f"Start-up, measured: {'; '.join(said)}.", ""] if said else []


def _makespans(args: argparse.Namespace, found: Found) -> list[str]:
    steps = args.trial_steps
    lines = [
        f"Makespans of trials of {steps} steps, computed from the above (steps x trials, start-up of every process "
        "counted; processes side by side start at once):",
        "",
        "| trials | size | (a) | (b) | (c) | (d) best pack | (a) / (d) | (c) / (d) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for trials in TRIALS:
        for size in args.sizes.split(","):
            a, b, c, d = spans(args, found, size, trials)
            shown = [_time(value) for value in (a, b, c, d and d[0])]
            shown[3] += f" ({d[1]})" if d else ""
            ratios = [_ratio(value, d and d[0]) for value in (a, c)]
            lines.append(f"| {trials} | {Size.title(size)} | {' | '.join(shown)} | {' | '.join(ratios)} |")
    return [*lines, ""]


def spans(
    args: argparse.Namespace, found: Found, size: str, trials: int
) -> tuple[float | None, float | None, float | None, tuple[float, int] | None]:
    """Seconds that trials take: one by one with peft, with ours, as processes, in the best packs (and their size)."""
    steps = args.trial_steps
    one, own, beside = (side.get(size, {}).get("step_s") for side in (found.peft, found.solo, found.many))
    a = trials * (found.peft_start + steps * one) if one and found.peft_start else None
    b = trials * (found.run_start + steps * own) if own and found.run_start else None
    c = None
    if beside and found.peft_start:
        waves = -(-trials // found.many[size]["processes"])
        c = waves * (found.peft_start + steps * beside)
    packs = []
    for slots in _slots(args):
        row = found.packed.get((size, slots), {})
        if "step_s" in row and found.pack_start and slots <= trials:
            packs.append(
                (found.pack_start + trials * found.join_s + -(-trials // slots) * steps * row["step_s"], slots)
            )
    return a, b, c, min(packs, default=None)


def _gains(args: argparse.Namespace, found: Found) -> list[str]:
    """What packing, start-up and early stopping each bring."""
    trials, steps = TRIALS[-1], args.trial_steps
    kept = asha_share(Scheduler().grace, Scheduler().reduction)
    lines = [
        f"Where the gain over peft one by one comes from, {trials} trials of {steps} steps. Early stopping is computed "
        f"from ASHA's rungs (grace {Scheduler().grace}, reduction {Scheduler().reduction}, {EVALUATIONS} evaluations): "
        f"if each rung lets exactly its share go on, {kept:.0%} of the steps are done; it is not measured here:",
        "",
        "| size | packing (steps alone) | start-up | both | early stopping | all three |",
        "|---|---|---|---|---|---|",
    ]
    for size in args.sizes.split(","):
        a, _, _, d = spans(args, found, size, trials)
        one = found.peft.get(size, {}).get("step_s")
        if a is None or d is None or one is None:
            continue
        packed = found.packed[(size, d[1])]["step_s"] * -(-trials // d[1])
        alone = trials * one / packed
        less = d[0] - (1 - kept) * steps * packed
        lines.append(
            f"| {Size.title(size)} | {alone:.1f}x | {a / d[0] / alone:.2f}x | {a / d[0]:.1f}x | {d[0] / less:.1f}x | "
            f"{a / less:.1f}x |"
        )
    return [*lines, ""]


def asha_share(grace: int, reduction: int, evaluations: int = EVALUATIONS) -> float:
    """Share of the steps that are done where each rung lets one trial of ``reduction`` go on."""
    done, left, at = 0.0, 1.0, 0
    rung = grace
    while rung < evaluations:
        done += left * (rung - at)
        left, at, rung = left / reduction, rung, rung * reduction
    return (done + left * (evaluations - at)) / evaluations


def _whole(found: Found) -> list[str]:
    row = found.whole
    if row is None:
        return []
    step = found.packed.get((row["size"], row["slots"]), {}).get("step_s")
    packs = row["trials"] // row["slots"]
    want = ""
    if step and found.pack_start:
        computed = found.pack_start + row["trials"] * found.join_s + packs * row["steps"] * step
        want = f" Computed as above: {computed:.1f} s."
    return [
        f"Timed whole, from the start of the process: {row['trials']} trials of {row['steps']} steps in packs of "
        f"{row['slots']}, {Size.title(row['size'])}: {row['wall_s']:.1f} s, of these {row['startup_s']:.1f} s to be "
        f"ready.{want}",
        "",
    ]


def _slots(args: argparse.Namespace) -> list[int]:
    return [int(slots) for slots in args.slots.split(",")]


def _ratio(value: float | None, to: float | None) -> str:
    return f"{value / to:.2f}" if value and to else ""


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return (
        f"{seconds:,.0f} s"
        if seconds < 600
        else f"{seconds / 60:,.0f} min"
        if seconds < 36000
        else f"{seconds / 3600:,.1f} h"
    )
