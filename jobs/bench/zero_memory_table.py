"""The figures of zero_memory.py as markdown."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

NAMES = {"ours": "Manta", "theirs": "transformers + peft + DeepSpeed"}
MIB = 2**20
SLACK = 1.15
AGREE = 1e-4
HOW = """\
How it is counted. *Held*: the distinct storages of parameters (this rank's shard, and what of it is whole), buffers
and quantization state. *Peak*: the kernel's high-water mark of resident memory (`VmHWM`, reset through
`/proc/self/clear_refs`) less what was resident at the reset. Pages of mapped files count in it, though the system can
take those back; *anonymous* leaves them out (`RssAnon`, sampled every 5 ms). Before the reset each process has loaded a
one-layer model in the same way, so that imports do not count. Manta's window holds the hash of the weights too. *When
training starts*: after `deepspeed.initialize`, LoRA not counted as held. *Limit*: {slack} x (4-bit and fp32 weights) /
ranks + one layer as held + the quantization state. *Alive*: of the bytes that a forward pass of {tokens} tokens
gathered, those whose storage something still holds after it while its graph is alive, found by weak
references to the storages. A single rank gathers nothing."""


def limit(rank: dict[str, Any], ranks: int) -> float:
    """What Manta's peak may be: a share with some slack, one layer as it is held, and the replicated state."""
    return float(SLACK * rank["total"] / ranks + rank["layer"] + rank["state"])


def report(
    command: str, threshold: int, tokens: int, memory: Sequence[dict[str, Any]], losses: dict[int, list[float]]
) -> str:
    """Both tables.

    Args:
        command: what was run.
        threshold: persistence threshold, elements.
        tokens: of each rank's forward pass.
        memory: per arrangement the side, the number of ranks, and what each rank found.
        losses: number of ranks -> loss of each step.
    """
    parts = [
        "# Memory of a ZeRO-3 sharded 4-bit base on CPU ranks",
        "",
        f"{hardware()}. Made by `{command}`; the sides ran one after the other in the same run.",
    ]
    if memory:
        parts += ["", *_memory(threshold, tokens, memory)]
    if losses:
        parts += ["", *_losses(losses)]
    return "\n".join(parts) + "\n"


def hardware() -> str:
    """Processor, memory and versions in one line."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = next((x.split(":", 1)[1].strip() for x in info.splitlines() if x.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "deepspeed", "transformers", "bitsandbytes", "peft"))
    return f"{model or platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB; {packages}"


def _memory(threshold: int, tokens: int, memory: Sequence[dict[str, Any]]) -> list[str]:
    lines, whole = [], ""
    if known := next((m["of"][0] for m in memory if m["side"] == "ours"), None):
        rest = (known["total"] - known["four_bit"]) / MIB
        whole = f" (tensors of {known['whole'] / MIB:,.1f} MiB in all are smaller and stay whole)"
        lines += [
            f"Llama shape, random weights, {known['parameters']:,} parameters, NF4 with double quantization: "
            f"{known['four_bit'] / MIB:,.1f} MiB of 4-bit weights, {rest:,.0f} MiB of embedding, head and norms in "
            f"fp32, {known['state'] / MIB:,.1f} MiB of quantization state. One layer is {known['layer'] / MIB:,.1f} "
            f"MiB as held and {known['layer_source'] / MIB:,.1f} MiB in the files (bf16).",
            "",
        ]
    lines += [
        f"MiB, each the highest of all ranks. Persistence threshold: {threshold:,} elements{whole}; the same ZeRO "
        "section on both sides.",
        "",
        "| ranks | | held after load | held when training starts | peak of load | limit | of the peak, anonymous | "
        "peak until training starts | alive after forward | with checkpointing |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    within = []
    for entry in memory:
        ranks, of, side = entry["ranks"], entry["of"], entry["side"]

        def most(key: str, of: list[dict[str, Any]] = of) -> str:
            return f"{max(rank[key] for rank in of) / MIB:,.0f}"

        def alive(mode: str, of: list[dict[str, Any]] = of) -> str:
            if not any(rank[f"gathered_{mode}"] for rank in of):
                return "nothing gathered"
            return max(
                (rank[f"alive_{mode}"] / MIB, f"{rank[f'alive_{mode}'] / MIB:,.0f} ({share(rank, mode)})")
                for rank in of
            )[1]

        def share(rank: dict[str, Any], mode: str) -> str:
            return f"{rank[f'alive_{mode}'] / rank[f'gathered_{mode}']:.0%}"

        bound = "-"
        if side == "ours":
            allowed = min(limit(rank, ranks) for rank in of)
            within.append(max(rank["peak"] for rank in of) <= allowed)
            bound = f"{allowed / MIB:,.0f}"
        checkpointed = alive("recompute") + (f"; reentrant {alive('reentrant')}" if "alive_reentrant" in of[0] else "")
        lines.append(
            f"| {ranks} | {NAMES[side]} | {most('storage')} | {most('storage_ready')} | {most('peak')} | "
            f"{bound} | {most('peak_anonymous')} | {most('peak_ready')} | {alive('plain')} | {checkpointed} |"
        )
    if within:
        lines += ["", f"Manta's peak of load is within its limit: {'yes' if all(within) else 'NO'}."]
    lines += ["", HOW.format(slack=SLACK, tokens=tokens)]
    return lines


def _losses(losses: dict[int, list[float]]) -> list[str]:
    first = losses[min(losses)]
    steps = sorted({0, *range(4, len(first), 5), len(first) - 1})
    apart = {n: max(abs(a - b) for a, b in zip(first, own, strict=True)) for n, own in losses.items()}
    return [
        f"Losses of {len(first)} steps of LoRA on the demo base (NF4, ZeRO-3, fp32, 12 samples a step):",
        "",
        "| ranks | "
        + " | ".join(f"step {s + 1}" for s in steps)
        + f" | furthest from {min(losses)} rank in any step |",
        "|---|" + "---|" * (len(steps) + 1),
        *(
            f"| {n} | " + " | ".join(f"{own[s]:.6f}" for s in steps) + f" | {apart[n]:.1e} |"
            for n, own in losses.items()
        ),
        "",
        f"Within {AGREE:g}: {'yes' if max(apart.values()) <= AGREE else 'NO'}.",
    ]
