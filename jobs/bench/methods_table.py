"""The table and the plots of the methods bench, from what its parts left."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from methods_settings import SETTINGS, best_lr
from numpy.typing import NDArray

SETS = {"sst2": "SST-2", "banking77": "Banking77"}
DRAWS = 10_000
MARGIN = 0.4
"""Points by which a method may be worse than full fine-tuning, beyond the interval."""
MARGIN_METHODS = ("bottleneck", "lora", "dora", "pissa")

MARKERS = "o^s"
"""Of ten colours each."""

Lines = list[dict[str, Any]]


def write(out: Path, to: Path, device: str) -> None:
    """``methods.md`` and ``methods.png``."""
    parts = {
        p.stem: [json.loads(line) for line in p.read_text().splitlines()]
        for p in out.glob("*.jsonl")
        if "." not in p.stem
    }
    rows = [Row(name, parts) for name in SETTINGS if any(v["setting"] == name for v in parts.get("sst2", []))]
    full = next((r for r in rows if r.name == "full"), rows[0])
    (to / "methods.md").write_text(_markdown(rows, full, parts, device))
    _plot(rows, to / "methods.png")


class Row:
    """One setting, over all sets."""

    def __init__(self, name: str, parts: dict[str, Lines]) -> None:
        self.name = name
        self.best = {s: _best([v for v in parts.get(s, []) if v["setting"] == name]) for s in SETS}
        self.peft = {s: [v for v in parts.get(f"peft-{s}", []) if v["setting"] == name] for s in SETS}
        self.e2e = next((v for v in parts.get("e2e", []) if v["setting"] == name and "bleu" in v), None)
        self.cost = next((v for v in parts.get("cost", []) if v["setting"] == name), None)
        any_line = next(b for b in self.best.values() if b)[0]
        self.parameters, self.share = any_line["parameters"], any_line["parameters"] / any_line["base"]
        self.bytes = any_line["bytes"]

    def mean(self, name: str) -> float:
        """Test accuracy in percent, mean over seeds."""
        return 100 * float(np.mean([v["test"] for v in self.best[name]]))


def _best(lines: Lines) -> Lines:
    """The seeds of the learning rate that was best on the dev split."""
    if not lines:
        return []
    lr = best_lr(lines, lines[0]["setting"])
    return [v for v in lines if v["lr"] == lr]


def right(lines: Lines) -> NDArray[np.bool_]:
    """[seeds, texts]: which answers are right."""
    return np.stack(
        [np.unpackbits(np.frombuffer(bytes.fromhex(v["right"]), np.uint8))[: v["count"]].astype(bool) for v in lines]
    )


def difference(one: Lines, other: Lines) -> tuple[float, float, float]:
    """Points by which ``one`` is better, and its 95 % interval: paired bootstrap over texts and seeds (Efron 1979)."""
    a, b = right(one).astype(float), right(other).astype(float)
    seeds = min(len(a), len(b))
    gap = a[:seeds] - b[:seeds]
    draw = np.random.default_rng(0)
    means = np.empty(DRAWS)
    for n in range(DRAWS):
        texts = draw.integers(0, gap.shape[1], gap.shape[1])
        means[n] = gap[draw.integers(0, seeds, seeds)][:, texts].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return 100 * float(gap.mean()), 100 * float(low), 100 * float(high)


def _markdown(rows: list[Row], full: Row, parts: dict[str, Lines], device: str) -> str:
    trials = {s: len(parts.get(s, [])) for s in (*SETS, "e2e")}
    packs = {s: {v["seconds"]: v["trials"] for v in parts.get(s, [])} for s in trials}
    lines = [
        "# Methods: quality, size, cost",
        "",
        f"{device}. Made by `python jobs/bench/methods.py --data DIR --encoder DIR --device cuda`. SST-2, Banking77: "
        "the MiniLM encoder (22.6 M parameters), fp32, mean pooling, a linear head that all have and that is not "
        f"counted; test accuracy, mean of seeds ({_seeds(rows)}), the learning rate chosen on a dev split with one of "
        "them. E2E: the demo base, one seed, BLEU (sacrebleu) of greedy answers. *To full*: points above full "
        "fine-tuning in the same run, with the 95 % interval of a paired bootstrap over texts and seeds. Empty cells "
        "were not run. Tokens/s and memory: solo training of the "
        "encoder, 32 texts of 128 tokens.",
        "",
        "| method | trained | % | file | SST-2 | to full | Banking77 | to full | E2E BLEU | tokens/s | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.name, f"{row.parameters:,}", f"{100 * row.share:.2f}", _bytes(row.bytes)]
        for name in SETS:
            if not row.best[name]:
                cells += ["", ""]
                continue
            cells.append(f"{row.mean(name):.2f}")
            gap, low, high = difference(row.best[name], full.best[name])
            cells.append("" if row is full else f"{gap:+.2f} ({low:+.2f}, {high:+.2f})")
        cells.append(f"{row.e2e['bleu']:.1f}" if row.e2e else "")
        cells += [f"{row.cost['tokens_per_s']:,.0f}", f"{row.cost['mib']:,.0f}"] if row.cost else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        *_goals(rows, full),
        "",
        *_peft(rows),
        "",
        "Trials packed on one frozen base: how many packs, and the seconds that these trained, added up:",
        "",
    ]
    lines += [f"- {s}: {trials[s]} trials, {len(p)} packs, {sum(p):,.0f} s" for s, p in packs.items() if p]
    lrs = [f"{r.name} " + "/".join(f"{r.best[s][0]['lr']:g}" for s in SETS if r.best[s]) for r in rows]
    lines += ["", "Learning rates chosen (SST-2/Banking77): " + ", ".join(lrs) + "."]
    return "\n".join(lines) + "\n"


def _seeds(rows: list[Row]) -> str:
    """How many seeds each set had."""
    most = {shown: max((len(r.best[name]) for r in rows), default=0) for name, shown in SETS.items()}
    return ", ".join(f"{shown} {count}" for shown, count in most.items())


def _goals(rows: list[Row], full: Row) -> list[str]:
    """Whether adapters and LoRA are as good as full fine-tuning, as far as the test sets can tell."""
    said = [
        f"Below full fine-tuning by no more than {MARGIN} points beyond the interval, with at most 3.6 % trained:",
        "",
    ]
    for row in rows:
        if not row.name.startswith(MARGIN_METHODS) or row.share > 0.036:
            continue
        verdicts = []
        for name, shown in SETS.items():
            if row.best[name]:
                gap, _, high = difference(row.best[name], full.best[name])
                verdicts.append(f"{shown} {'yes' if high >= -MARGIN else 'NO'} ({gap:+.2f})")
        said.append(f"- {row.name}: {', '.join(verdicts)}")
    return said


def _peft(rows: list[Row]) -> list[str]:
    """Ours beside peft's own implementation (and transformers' full fine-tuning)."""
    said = [
        "Beside peft's own implementation, and full fine-tuning by transformers alone: same records, order, rates and "
        "steps, start values of their own (points by which ours is better):",
        "",
        "| method | " + " | ".join(f"{shown}: theirs | ours | difference" for shown in SETS.values()) + " |",
        "|---|" + "---|" * (3 * len(SETS)),
    ]
    for row in rows:
        if not any(row.peft.values()):
            continue
        cells = [row.name]
        for name in SETS:
            theirs = row.peft[name]
            if not theirs:
                cells += ["", "", ""]
                continue
            gap, low, high = difference(row.best[name], theirs)
            cells += [f"{100 * float(np.mean([v['test'] for v in theirs])):.2f}", f"{row.mean(name):.2f}"]
            cells.append(f"{gap:+.2f} ({low:+.2f}, {high:+.2f})")
        said.append("| " + " | ".join(cells) + " |")
    return said


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _plot(rows: list[Row], path: Path) -> None:
    """Quality against trained parameters, and against memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    xs = ({r.name: r.parameters for r in rows}, {r.name: r.cost["mib"] for r in rows if r.cost and r.cost["mib"]})
    for axis, x, label in zip(axes, xs, ("trained parameters", "peak memory of training, MiB"), strict=True):
        for number, row in enumerate(rows):
            y = float(np.mean([row.mean(s) for s in SETS if row.best[s]]))
            color, marker = pyplot.get_cmap("tab10")(number % 10), MARKERS[number // 10]
            axis.scatter(x.get(row.name, np.nan), y, s=70, color=color, marker=marker, label=row.name)
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    seen = [shown for name, shown in SETS.items() if any(r.best[name] for r in rows)]
    axes[0].set_ylabel(f"test accuracy, {'mean of ' if len(seen) > 1 else ''}{' and '.join(seen)}, %")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
