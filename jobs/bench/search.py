"""A search packed by ``manta tune``, beside the same trials one by one: makespan, and where the time goes.

    python jobs/bench/search.py --out out/search                     # go on where it was
    python jobs/bench/search.py --out out/search budget.trials=6     # with overrides of the search

First the search, then each of its trials as a run of its own (the way of jobs/train.py, a process each, to its full
length). What is done is kept in ``--out`` and is not done again: kill it and start it anew. The table is written after
each trial; with ``--most`` only so many trials are run one by one, and the rest is computed from their means, said so.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEARCH = HERE.parent / "runs" / "search.yaml"


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["MANTA_HOME"] = str(args.out.absolute() / "home")
    if args.part == "packed":
        packed(args)
        return
    if args.part:
        solo(args, args.part)
        return
    if not (args.out / "packed.json").exists():
        begin = time.monotonic()
        child(args, "packed")
        taken = time.monotonic() - begin
        note(args.out / "packed.json", {**read(args.out / "packed.json"), "process_s": taken})
    found = read(args.out / "packed.json")
    for number, row in enumerate(found["trials"][: args.most]):
        path = args.out / f"{row['trial']}.json"
        if not path.exists() and row["run"]:
            print(f"one by one: {number + 1} of {len(found['trials'])}, {row['trial']}", flush=True)
            begin = time.monotonic()
            child(args, row["trial"])
            note(path, {**read(path), "wall_s": time.monotonic() - begin})
        if args.table:
            args.table.write_text(table(args))
    print(table(args))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value of the search")
    parser.add_argument("--search", type=Path, default=SEARCH, help="file of the search (default: the shipped one)")
    parser.add_argument("--out", type=Path, default=Path("out/search"), help="what is done (default: out/search)")
    parser.add_argument("--most", type=int, help="trials to run one by one (default: all)")
    parser.add_argument("--table", type=Path, help="markdown to write, such as jobs/bench/search.md")
    parser.add_argument("--device-name", help="what the table calls the machine")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(args: argparse.Namespace, part: str) -> None:
    """A part in a process of its own, as a user starts one."""
    line = [sys.executable, __file__, "--part", part, "--out", str(args.out), "--search", str(args.search)]
    with (args.out / f"{part}.log").open("a") as log:
        done = subprocess.run([*line, *args.overrides], stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{part} failed; see {args.out / f'{part}.log'}; start this again to go on")


def note(path: Path, values: Mapping[str, Any]) -> None:
    """Keep it, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values))
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What was kept."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def packed(args: argparse.Namespace) -> None:
    """The search, or the rest of it."""
    from orchestrator.config.load import load_search
    from orchestrator.launch.tune import tune
    from orchestrator.search.study import folder_of

    started = sorted(p.name for p in folder_of("x").parent.glob("*") if p.is_dir())
    outcome = tune(load_search(args.search, args.overrides), resume=started[-1] if started else None)
    if not outcome.complete:
        sys.exit(f"the search is not over: {outcome.why}")
    study = outcome.study
    trials = [
        {
            "trial": row.trial,
            "number": row.number,
            "method": row.method,
            "run": row.run,
            "state": row.state,
            "reason": row.reason,
            "step": row.step,
            "total": row.total,
            "tokens": row.tokens,
            "losses": row.curves.get("loss", {}),
            "value": row.value(study.metrics[0]),
            "begin": [span.begin - (study.began_at or 0.0) for span in row.spans],
            "end": [span.end - (study.began_at or 0.0) for span in row.spans],
        }
        for row in sorted(study.rows.values(), key=lambda row: row.number)
    ]
    winner = outcome.winner.trial if outcome.winner else None
    values = {"trials": trials, "active_s": study.active_seconds, "winner": winner, "resumed": bool(started)}
    note(args.out / "packed.json", {**values, "metric": study.metrics[0], "name": study.search.name})


def solo(args: argparse.Namespace, trial: str) -> None:
    """One of its trials as a run."""
    from orchestrator.config import Run
    from orchestrator.launch.train import train

    row = next(row for row in read(args.out / "packed.json")["trials"] if row["trial"] == trial)
    times: dict[int, float] = {}
    losses: dict[int, float] = {}
    evals: list[float] = []
    metric = read(args.out / "packed.json")["metric"]

    def listen(kind: str, values: dict[str, Any]) -> None:
        if kind == "step":
            times[values["step"]] = time.monotonic()
            losses[values["step"]] = values["loss"]
        if kind == "eval" and metric in values:
            evals.append(values[metric])

    begin = time.monotonic()
    train(Run.model_validate(row["run"]), listen=listen)
    end = time.monotonic()
    first, last = min(times), max(times)
    values = {"start_s": times[first] - begin, "train_s": times[last] - times[first], "end_s": end - times[last]}
    note(args.out / f"{trial}.json", {**values, "losses": losses, "evals": evals, "step": last})


def table(args: argparse.Namespace) -> str:
    """Both beside each other."""
    found = read(args.out / "packed.json")
    rows = found["trials"]
    solos = {row["trial"]: read(path) for row in rows if (path := args.out / f"{row['trial']}.json").exists()}
    solos = {trial: one for trial, one in solos.items() if "wall_s" in one}
    span, steps = found["process_s"], sum(row["step"] for row in rows)
    busy = max(e for row in rows for e in row["end"]) - min(b for row in rows for b in row["begin"])
    states = {state: sum(row["state"] == state for row in rows) for state in ("finished", "stopped", "failed")}
    name = args.device_name or f"{os.cpu_count()} cores of a {platform.processor() or platform.machine()} CPU"
    lines = [
        f"# A search packed, and its trials one by one: {found['name']}",
        "",
        f"{name}. Made by `python jobs/bench/search.py{' ' if args.overrides else ''}{' '.join(args.overrides)}`. "
        f"{len(rows)} trials: {', '.join(f'{count} {state}' for state, count in states.items())}. *One by one*: each "
        "trial a run of its own, in its own process, to its full length. *With the same stops*: the same, each "
        "stopped where the search stopped it (computed: its start-up and the share of its steps).",
        "",
        "| | makespan | trial-steps | trial-steps/s | packed is faster |",
        "|---|---|---|---|---|",
        f"| packed (`manta tune`) | {span:,.0f} s | {steps:,} | {steps / span:.2f} | |",
    ]
    if found["resumed"]:
        lines[2] += " The search was interrupted; its time is that of the last process alone."
    if solos:
        full, stopped = _one_by_one(rows, solos)
        total = sum(row["total"] for row in rows)
        sides = (("one by one, the same stops", stopped, steps), ("one by one, to the end", full, total))
        lines += [
            *(f"| {side} | {s:,.0f} s | {n:,} | {n / s:.2f} | {s / span:.1f}x |" for side, s, n in sides),
            "",
            *_shares(rows, solos, found, busy, steps),
        ]
        missing = len(rows) - len(solos)
        if missing:
            lines += [
                "",
                f"{missing} trials were not run one by one; they are computed from the others' start-up and steps.",
            ]
    return "\n".join(lines) + "\n"


def _one_by_one(rows: list[dict[str, Any]], solos: Mapping[str, dict[str, Any]]) -> tuple[float, float]:
    """Seconds of all trials one by one: to the end, and as far as the search took them."""
    ones = solos.values()
    around = statistics.mean(one["wall_s"] - one["train_s"] for one in ones)
    step_s = sum(one["train_s"] for one in ones) / sum(max(1, one["step"] - 1) for one in ones)
    full = stopped = 0.0
    for row in rows:
        one = solos.get(row["trial"]) or {
            "wall_s": around + step_s * row["total"],
            "train_s": step_s * row["total"],
            "step": row["total"],
        }
        full += one["wall_s"]
        stopped += one["wall_s"] - one["train_s"] * (1 - row["step"] / max(1, one["step"]))
    return full, stopped


def _shares(
    rows: list[dict[str, Any]], solos: Mapping[str, dict[str, Any]], found: Mapping[str, Any], busy: float, steps: int
) -> list[str]:
    """Start-up, training and early stopping told apart, and whether the losses are the same."""
    ones = list(solos.values())
    start = statistics.mean(one["wall_s"] - one["train_s"] for one in ones)
    step_s = sum(one["train_s"] for one in ones) / sum(one["step"] - 1 for one in ones)
    far, compared = _distance(rows, solos)
    total = sum(row["total"] for row in rows)
    return [
        f"- Start-up and end of a run of its own: {start:.1f} s each, {start * len(rows):,.0f} s for all; of the "
        f"search: {found['process_s'] - busy:.1f} s.",
        f"- Training, evaluations included: {step_s:.3f} s a trial-step alone, {busy / max(1, steps):.3f} s packed "
        f"({step_s * steps / busy:.1f}x).",
        f"- Early stopping left {steps:,} of {total:,} trial-steps ({steps / total:.0%}).",
        f"- Losses of the same step of the same trial, packed and alone: {far:.1e} apart at most, relative, over "
        f"{compared:,} steps.",
    ]


def _distance(rows: list[dict[str, Any]], solos: Mapping[str, dict[str, Any]]) -> tuple[float, int]:
    far, compared = 0.0, 0
    for row in rows:
        alone = solos.get(row["trial"], {}).get("losses", {})
        for step, loss in row["losses"].items():
            if step in alone and row["state"] != "failed":
                far = max(far, abs(loss - alone[step]) / max(abs(alone[step]), 1e-12))
                compared += 1
    return far, compared


if __name__ == "__main__":
    main()
