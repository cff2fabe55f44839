"""Real data: what a search finds, against default LoRA and against a sweep of LoRA's learning rate of the same budget.

    python jobs/bench/search_quality.py --data DIR --encoder DIR --out out/search_quality

``--data`` holds ``banking77`` and ``sst2`` as JSONL, ``--encoder`` is a transformers folder of
``sentence-transformers/all-MiniLM-L6-v2``. First the search over methods, then the sweep, each with ``manta tune`` and
judged on a dev split. Then the three settings that came of it are trained anew with three seeds each, which neither
search has seen, and judged on the test split: all of them in one pack. What is done is kept in ``--out``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = ("search", "sweep", "final")
METHODS: tuple[Any, ...] = (
    "lora",
    {"type": "lora", "dora": True},
    "bottleneck",
    "ia3",
    "bitfit",
    "prefix",
    "sparse",
    {"type": "last_layers", "layers": {"choice": [1, 2]}},
)
SEEDS = (1, 2, 3)
"""Of the last trainings; the searches have seed 0."""


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["MANTA_HOME"] = str(args.out.absolute() / "home")
    if args.part:
        part(args)
        return
    for name in args.parts.split(","):
        if name not in PARTS:
            sys.exit(f"--parts: {name!r} is none of {', '.join(PARTS)}")
        if (args.out / f"{name}.json").exists():
            continue
        begin = time.monotonic()
        print(f"{name} ...", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", name], check=True)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    if all((args.out / f"{name}.json").exists() for name in PARTS):
        from search_quality_table import write

        print(write(args))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77 and sst2")
    parser.add_argument("--encoder", type=Path, required=True, help="folder of the MiniLM encoder")
    parser.add_argument("--set", default="banking77", choices=["banking77", "sst2"], help="default: banking77")
    parser.add_argument("--out", type=Path, default=Path("out/search_quality"), help="what is done")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--trials", type=int, default=32, help="of each search (default: 32)")
    parser.add_argument("--epochs", type=float, default=0.0, help="of each training (default: the set's own)")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a pass when the test split is judged")
    parser.add_argument("--limit", type=int, default=0, help="records of training, dev and test, to try it out")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--device-name", help="what the table calls the machine")
    parser.add_argument("--to", type=Path, default=HERE, help="where table and picture go (default: beside this)")
    parser.add_argument("--set-override", nargs="*", default=[], help="key=value for both searches")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def part(args: argparse.Namespace) -> None:
    """One part, in this process."""
    if args.part == "final":
        from search_quality_final import final

        found = final(args, chosen_settings(args))
    else:
        found = searched(args, args.part)
    path = args.out / f"{args.part}.json"
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").replace(path)


def searched(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A search, or the rest of one that was interrupted."""
    from orchestrator.config.load import load_search
    from orchestrator.launch.tune import tune
    from orchestrator.search.study import folder_of

    started = sorted(p.name for p in folder_of("x").parent.glob(f"{name}-*") if p.is_dir())
    outcome = tune(load_search(search_file(args, name), args.set_override), resume=started[-1] if started else None)
    if not outcome.complete or outcome.winner is None:
        sys.exit(f"{name} is not over: {outcome.why}; start this again to go on")
    rows = [
        {
            "trial": row.trial,
            "method": f"{row.method}{' dora' if row.run.get('method', {}).get('dora') else ''}",
            "params": row.params,
            "state": row.state,
            "dev": row.value("accuracy"),
            "parameters": row.parameters,
            "tokens": row.tokens,
        }
        for row in outcome.study.rows.values()
    ]
    front = [row.trial for row in outcome.study.front()]
    return {"rows": rows, "winner": outcome.winner.trial, "run": outcome.winner.run, "front": front,
            "seconds": outcome.study.active_seconds}  # fmt: skip


def search_file(args: argparse.Namespace, name: str) -> Path:
    """The search as a file: over methods, or over LoRA's learning rate alone, the rest as LoRA has it by default."""
    from methods_sets import SETS

    from orchestrator.config import Lora

    chosen = SETS[args.set]
    train, dev, _ = splits(args)
    every = Lora()
    fixed = {"type": "lora", "rank": every.rank, "alpha": every.alpha, "train.lr": {"log": [5e-5, 2e-2]}}
    values = {
        "name": name,
        "base": {"id": str(args.encoder.absolute()), "quantize": "none", "precision": "fp32", "kernels": "none"},
        "data": {"train": str(train), "eval": str(dev), "length": chosen.length},
        "task": {"type": "classification", "pooling": "mean"},
        "methods": list(METHODS) if name == "search" else [fixed],
        "train": {"epochs": args.epochs or chosen.epochs, "batch_size": chosen.batch_size, "rows_per_pass": 16},
        "budget": {"trials": args.trials},
        "objective": ["accuracy", "parameters"] if name == "search" else ["accuracy"],
        "cluster": {"gpus_per_worker": int(args.device == "cuda")},
    }
    path: Path = args.out / f"{name}.yaml"
    path.write_text(json.dumps(values, indent=2))  # JSON is YAML
    return path


def splits(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Training, dev and test records."""
    from methods_sets import SETS, split

    chosen = SETS[args.set]
    test = args.data / f"{chosen.test}.jsonl"
    if chosen.dev is None:
        train, dev = split(args, chosen)
    else:
        train, dev = (args.data / f"{name}.jsonl" for name in (chosen.train, chosen.dev))
    if not args.limit:
        return train.absolute(), dev.absolute(), test.absolute()
    cut, labels = [], sorted({json.loads(line)["label"] for line in train.read_text().splitlines()})
    few = set(labels[: max(2, args.limit // 40)])  # some of the labels, so that each is in every split
    for path in (train, dev, test):
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["label"] in few]
        kept = args.out / f"few-{path.parent.name}-{path.name}"
        kept.write_text("\n".join(lines[:: max(1, len(lines) // args.limit)]) + "\n")
        cut.append(kept.absolute())
    return cut[0], cut[1], cut[2]


def chosen_settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs that are trained anew: default LoRA, the sweep's best and the search's best."""
    found = {name: json.loads((args.out / f"{name}.json").read_text()) for name in ("search", "sweep")}
    sweep, search = found["sweep"]["run"], found["search"]["run"]
    plain = {**sweep, "method": {"type": "lora"}, "train": {**sweep["train"], "lr": None}}
    return {"default LoRA": plain, "LoRA, learning rate swept": sweep, "the search's winner": search}


if __name__ == "__main__":
    main()
