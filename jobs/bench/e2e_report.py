"""The table of ``e2e.py``: what the parts left, in words and figures."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

NEAR = 0.5
"""BLEU points that a delta of ours may lie below one of peft's."""
UNEQUAL = 1.0
"""Difference in load from which speeds by the clock cannot be compared."""
TITLES = {
    "ours": "Manta",
    "theirs": "peft + transformers",
    "own": "peft + transformers, start values of its own",
    "bare": "the bare base",
}
SHOWN = 6


def report(
    out: Path, run: Any, records: Sequence[dict[str, Any]], seeds: Sequence[int], own: bool, command: str
) -> str:
    """Markdown.

    Args:
        out: folder of the parts.
        run: a run as both sides trained it.
        records: the prompts with their references.
        seeds: one pair of runs each.
        own: whether there is a third run with start values of its own.
        command: what made it.
    """
    sides = ["ours", "theirs", *(["own"] if own else [])]
    got = {(side, seed): read(out / f"{side}-{seed}.json") for side in sides for seed in seeds}
    said = {(side, seed): read(out / f"answers-{side}-{seed}.json") for side in sides for seed in seeds}
    bare = read(out / f"answers-bare-{seeds[0]}.json")
    scores = {key: bleu(a["answers"], records) for key, a in said.items()}
    differences = [scores["ours", s][0] - scores["theirs", s][0] for s in seeds]
    first = got["ours", seeds[0]]
    pieces = [
        "# E2E NLG: Manta beside peft + transformers",
        f"Made by `{command}`, where DIR holds the E2E set (CC BY-SA 4.0), which is not shipped.",
        settings(run, len(first["losses"]), got["theirs", seeds[0]]["forward_error"], records),
        "## Quality",
        table(
            ["seed", "", "BLEU", "held-out loss", "last training loss"],
            [
                [str(seed), TITLES[side], f"{scores[side, seed][0]:.2f}", f"{said[side, seed]['loss']:.4f}", last]
                for seed in seeds
                for side in sides
                for last in [f"{mean(got[side, seed]['losses'][-20:]):.4f}"]
            ]
            + [["-", TITLES["bare"], f"{bleu(bare['answers'], records)[0]:.2f}", f"{bare['loss']:.4f}", "-"]],
        ),
        verdict(differences, seeds),
        *(nearness(out, got, records, seed) for seed in seeds),
        f"BLEU is sacrebleu's: `{scores['ours', seeds[0]][1]}`. The held-out loss is that of each prompt's first "
        "reference, in nats per token; the last training loss is the mean of the last 20 steps.",
        "## Speed and memory",
        f"On {hardware()}.",
        table(
            ["seed", "", "tokens/s", "tokens per CPU second", "peak memory of a process, GiB", "processes", "load"],
            [
                [str(seed), TITLES[side], *figures(g)]
                for (side, seed), g in sorted(got.items(), key=lambda item: item[0][1])
            ],
        ),
        ratios(got, seeds),
        "## Samples",
        "Every n-th prompt, not chosen.",
        *samples(records, said["ours", seeds[0]]["answers"], said["theirs", seeds[0]]["answers"]),
    ]
    return "\n\n".join(pieces) + "\n"


def read(path: Path) -> Any:
    """A part's result."""
    return json.loads(path.read_text())


def bleu(answers: Sequence[str], records: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """Corpus BLEU against all references, 0 to 100, and sacrebleu's signature."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(answers), columns(records)).score
    return float(score), str(metric.get_signature())


def columns(records: Sequence[dict[str, Any]]) -> list[list[str | None]]:
    """The i-th references of all prompts, None where a prompt has fewer."""
    most = max(len(r["references"]) for r in records)
    return [[r["references"][i] if i < len(r["references"]) else None for r in records] for i in range(most)]


def verdict(differences: Sequence[float], seeds: Sequence[int]) -> str:
    """The differences, and whether each is near enough."""
    each = ", ".join(f"{d:+.2f} (seed {s})" for d, s in zip(differences, seeds, strict=True))
    far = [f"{d:+.2f}" for d in differences if abs(d) > NEAR]
    end = f"**not** within {NEAR}: {', '.join(far)}" if far else f"within {NEAR}"
    return f"BLEU of Manta minus that of peft + transformers: {each}; {end}."


def nearness(out: Path, got: dict[tuple[str, int], Any], records: Sequence[dict[str, Any]], seed: int) -> str:
    """How near the two runs of a seed are, step by step and answer by answer."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    ours, theirs = (read(out / f"answers-{side}-{seed}.json")["answers"] for side in ("ours", "theirs"))
    apart = [abs(a - b) for a, b in zip(got["ours", seed]["losses"], got["theirs", seed]["losses"], strict=True)]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    text = (
        f"Seed {seed}: training losses differ by at most {max(apart[:50]):.1e} in the first {min(50, len(apart))} "
        f"steps and {max(apart):.1e} in all {len(apart)}; {same} of {len(ours)} answers are the same."
    )
    if same == len(ours):
        return text
    metric = {"BLEU": BLEU(references=columns(records))}
    _, found = PairedTest([("theirs", theirs), ("ours", ours)], metric, None, test_type="bs", n_samples=1000)()
    return f"{text} Paired bootstrap over prompts (1,000 draws): p = {found['BLEU'][1].p_value:.2f} for the difference."


def ratios(got: dict[tuple[str, int], Any], seeds: Sequence[int]) -> str:
    """Ours by theirs."""

    def ratio(key: str) -> str:
        return ", ".join(f"{got['ours', s][key] / got['theirs', s][key]:.2f}" for s in seeds)

    total = ", ".join(
        f"{got['ours', s]['peak_gib'] * got['ours', s]['processes'] / got['theirs', s]['peak_gib']:.2f}" for s in seeds
    )
    wall = ", ".join(f"{got['ours', s]['wall_s']:.0f} to {got['theirs', s]['wall_s']:.0f} s" for s in seeds)
    clock = (
        f"{ratio('tokens_per_s')} in tokens/s of the median step; from start to delta, on our side with tokenizing, "
        f"checkpoints, tracking and registering, {wall}."
    )
    if any(abs(got["ours", s]["load"] - got["theirs", s]["load"]) > UNEQUAL for s in seeds):
        clock += (
            " **Others used the machine, and not equally much (see the load), so these two say nothing of the "
            "software**; tokens per CPU second suffer less from that."
        )
    return (
        f"Manta by peft + transformers: {ratio('tokens_per_cpu_s')} in tokens per CPU second, {ratio('peak_gib')} in "
        f"memory of a process, {total} in memory of all training processes; {clock}\n\n"
        "No figure counts padding. Load is that of the last five minutes at the end; the run's own part of it is "
        "about the number of cores. CPU seconds are those of all threads of the training processes from the second "
        "step on, checkpoints included, Ray's and the driver's own processes not. Memory is resident memory, looked "
        "at twice a second: for a base of a few MiB it is nearly all libraries, so it says nothing about large ones."
    )


def settings(run: Any, steps: int, error: float, records: Sequence[dict[str, Any]]) -> str:
    """What both sides have in common."""
    t, m = run.train, run.method
    many = sum(len(r["references"]) for r in records)
    return (
        f"Base `{run.base.id}`, {run.base.quantize}, fp32 on the CPU; LoRA rank {m.rank}, alpha {m.alpha:g}, on "
        f"{', '.join(m.targets)}; {steps} steps of {t.batch_size} records, AdamW at {t.lr:g} ({t.schedule}, warm-up "
        f"{t.warmup:g}), clipping at {t.clip:g}. Same batches in the same order, same start values unless said "
        f"otherwise. Manta: {run.cluster.workers.max} workers, ZeRO-{run.cluster.zero.stage}, rows packed to "
        f"{run.data.length} tokens. peft + transformers: one process with {run.cluster.workers.max} threads, a plain "
        "loop, rows padded to the longest, bitsandbytes' 4-bit linears, whose forward in training differs from the "
        f"fp32 product with the same 4-bit weights by at most {error:.1e}. Judged on {len(records)} prompts with "
        f"{many} references: greedy answers by transformers on the same dense base in fp32, each delta loaded by peft."
    )


def figures(g: Any) -> list[str]:
    """Speed and memory of a run, for the table."""
    speed = [f"{g[key]:,.0f}" for key in ("tokens_per_s", "tokens_per_cpu_s")]
    return [*speed, f"{g['peak_gib']:.2f}", str(g["processes"]), f"{g['load']:.1f}"]


def hardware() -> str:
    """Cores, processor and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    names = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "ray")
    return f"{os.cpu_count()} cores, {model}; " + ", ".join(f"{n} {version(n)}" for n in names)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def samples(records: Sequence[dict[str, Any]], ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Some prompts, spread over the set, with a reference and both answers."""
    chosen = [i * len(records) // SHOWN for i in range(min(SHOWN, len(records)))]
    return [
        f"`{records[i]['prompt']}`\n\n- reference: {records[i]['references'][0]}\n- Manta: {ours[i]}\n"
        f"- peft + transformers: {theirs[i]}"
        for i in chosen
    ]
