"""Table and picture of search_quality.py."""

import argparse
import json
from typing import Any

import numpy as np
from methods import device_name
from methods_table import difference

SHOWN = {"banking77": "Banking77", "sst2": "SST-2"}


def write(args: argparse.Namespace) -> str:
    """``search_quality.md`` and ``search_quality.png``; returns the former."""
    search, sweep, final = (json.loads((args.out / f"{n}.json").read_text()) for n in ("search", "sweep", "final"))
    text = _markdown(args, search, sweep, final)
    (args.to / "search_quality.md").write_text(text)
    _plot(args, search)
    return text


def _markdown(args: argparse.Namespace, search: dict[str, Any], sweep: dict[str, Any], final: dict[str, Any]) -> str:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in final["lines"]:
        by_name.setdefault(line["setting"], []).append(line)
    runs = {name: sorted(lines, key=lambda line: line["seed"]) for name, lines in by_name.items()}
    others = [name for name in runs if name != "the search's winner"]
    winner = runs["the search's winner"]
    lines = [
        f"# What a search finds: {SHOWN[args.set]}",
        "",
        f"{args.device_name or device_name(args.device)}. Made by `python jobs/bench/search_quality.py --data DIR "
        f"--encoder DIR --set {args.set} --trials {args.trials}{f' --limit {args.limit}' if args.limit else ''}`. The "
        "MiniLM encoder (22.6 M parameters, fp32). "
        f"Search: {len(search['rows'])} trials, {_tokens(search):,} training tokens, {search['seconds']:,.0f} s. Sweep "
        f"of LoRA's learning rate alone: {len(sweep['rows'])} trials, {_tokens(sweep):,} tokens, "
        f"{sweep['seconds']:,.0f} s. Each judged its trials on a dev split; what it chose was trained anew with "
        f"{len(winner)} further seeds and judged on the test split ({winner[0]['count']:,} texts).",
        "",
        "| | method | learning rate | batch | trained | test accuracy | the search's winner is better by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [*others, "the search's winner"]:
        one = runs[name][0]
        accuracy = 100 * float(np.mean([line["test"] for line in runs[name]]))
        gap = ""
        if name in others:
            mean, low, high = difference(winner, runs[name])
            gap = f"{mean:+.2f} ({low:+.2f}, {high:+.2f})"
        lines.append(
            f"| {name} | {_knobs(one['method'])} | {one['lr']:.2g} | {one['batch_size']} | {one['parameters']:,} | "
            f"{accuracy:.2f} | {gap} |"
        )
    lines += [
        "",
        "In points, with the 95 % interval of a paired bootstrap over texts and seeds. Trained: with the head.",
        "",
        "The best trial of each method, dev split:",
        "",
        "| method | trials | dev accuracy | trained | point |",
        "|---|---|---|---|---|",
    ]
    for label in sorted({row["method"] for row in search["rows"]}, key=lambda m: -_best(search, m)["dev"]):
        mine, best = [r for r in search["rows"] if r["method"] == label], _best(search, label)
        point = ", ".join(f"{k.rpartition('.')[2]} {_short(v)}" for k, v in best["params"].items() if k != "method")
        size = f"{best['parameters']:,}" if best["parameters"] else ""
        dev = f"{100 * best['dev']:.2f}" if best["dev"] >= 0 else ""
        lines.append(f"| {label} | {len(mine)} | {dev} | {size} | {point} |")
    return "\n".join(lines) + "\n"


def _best(search: dict[str, Any], label: str) -> dict[str, Any]:
    """A method's best trial; of one whose trials have no value, the first."""
    mine = [{**row, "dev": -1.0 if row["dev"] is None else row["dev"]} for row in search["rows"]]
    return max((row for row in mine if row["method"] == label), key=lambda row: float(row["dev"]))


def _tokens(found: dict[str, Any]) -> int:
    return sum(row["tokens"] for row in found["rows"])


def _knobs(method: dict[str, Any]) -> str:
    """Type and size."""
    sizes = ("rank", "dora", "size", "placement", "tokens", "density", "layers")
    return " ".join([method["type"], *(f"{k} {_short(v)}" for k in sizes if (v := method.get(k)) not in (None, False))])


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _plot(args: argparse.Namespace, search: dict[str, Any]) -> None:
    """Accuracy against trained parameters, and the front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in search["rows"] if row["dev"] is not None and row["parameters"] and row["state"] != "failed"]
    figure, axis = pyplot.subplots(figsize=(8, 4.8))
    for number, label in enumerate(sorted({row["method"] for row in rows})):
        mine = [row for row in rows if row["method"] == label]
        for state, alpha in (("finished", 1.0), ("stopped", 0.35)):
            some = [row for row in mine if row["state"] == state]
            axis.scatter(
                [row["parameters"] for row in some],
                [100 * row["dev"] for row in some],
                s=50,
                alpha=alpha,
                color=pyplot.get_cmap("tab10")(number % 10),
                label=label if state == "finished" else None,
            )
    best = sorted((r for r in rows if r["trial"] in search["front"]), key=lambda r: float(r["parameters"]))
    axis.step(
        [row["parameters"] for row in best],
        [100 * row["dev"] for row in best],
        where="post",
        color="#444444",
        linewidth=1,
        linestyle="--",
        label="Pareto front",
    )
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters, with the head")
    axis.set_ylabel(f"{SHOWN[args.set]}, dev accuracy, %")
    axis.set_title(f"One search of {len(search['rows'])} trials (pale: stopped early)", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    figure.tight_layout()
    figure.savefig(args.to / "search_quality.png", dpi=130)
