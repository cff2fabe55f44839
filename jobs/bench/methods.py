"""Every method beside full fine-tuning and peft: quality, size, speed and memory, on real data.

    python jobs/bench/methods.py --data DIR --encoder DIR

Sets: ``sst2`` and ``banking77`` (classification, a pretrained MiniLM encoder; three seeds, learning rate chosen per
method on a dev split) and ``e2e`` (generation, the demo base, BLEU). All trials of a set train at once, packed on one
frozen base, and that is what makes the choice of learning rates cheap: first every rate with one seed, then the best
with the others. ``--data`` holds ``sst2``, ``banking77`` and
``e2e_nlg`` as JSONL; ``--encoder`` is a transformers folder of ``sentence-transformers/all-MiniLM-L6-v2``.

What is done is kept in ``--out`` (one JSON line a trial), and is not done again: kill it and start it anew. At the end
the table and the plots are written beside this script.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from methods_settings import SEEDS, SETTINGS, Trial, best_lr, trials

HERE = Path(__file__).parent
PARTS = ("sst2", "banking77", "e2e", "cost", "peft-sst2", "peft-banking77")


def main() -> None:
    args = arguments()
    if args.part:
        part(args, args.part)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.parts.split(","):
        if name not in PARTS:
            sys.exit(f"--parts: {name!r} is none of {', '.join(PARTS)}")
        print(f"{name} ...", flush=True)
        begin = time.monotonic()
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", name], check=True)
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    if args.table:
        from methods_table import write

        write(args.out, HERE, args.device_name or device_name(args.device))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with sst2, banking77 and e2e_nlg")
    parser.add_argument("--encoder", type=Path, help="folder of the MiniLM encoder")
    parser.add_argument("--out", type=Path, default=Path("out/methods"), help="what is done (default: out/methods)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which lines of the table (default: all)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--device-name", help="what the table calls the machine")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of one forward pass of a pack, about")
    parser.add_argument("--epochs", type=float, default=0.0, help="passes over a set (default: the set's own)")
    parser.add_argument("--limit", type=int, default=0, help="steps at most, to try it out")
    parser.add_argument("--no-table", dest="table", action="store_false", help="only train")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def device_name(device: str) -> str:
    """The machine, in words."""
    import platform

    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def part(args: argparse.Namespace, name: str) -> None:
    """One set, in this process."""
    log = Log(args.out / f"{name}.jsonl")
    names = [n.strip() for n in args.settings.split(",")]
    if name == "cost":
        from methods_cost import cost

        cost(args, log, names)
    elif name.startswith("peft-"):
        from methods_peft import beside_peft

        beside_peft(args, log, name.removeprefix("peft-"), names)
    else:
        from methods_sets import run

        todo(args, name, trials(names, SEEDS[:1]), log, run)
        if name != "e2e":
            chosen = [Trial(n, best_lr(log.lines, n), seed) for n in names for seed in SEEDS[1:]]
            todo(args, name, chosen, log, run)


def todo(args: argparse.Namespace, name: str, wanted: list[Trial], log: "Log", run: Any) -> None:
    """Run what is not done yet, all at once."""
    asked = [t for t in wanted if (t.setting, t.lr, t.seed) not in log.done]
    if asked:
        run(args, name, asked, log)


class Log:
    """One JSON line for each trial that is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        self.done = {(v["setting"], v.get("lr"), v.get("seed")) for v in self.lines}

    def add(self, trial: Trial, **values: Any) -> None:
        """A trial is done."""
        self.write({"setting": trial.setting, "lr": trial.lr, "seed": trial.seed, **values})

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)


def chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    """Lists of at most ``size``."""
    return (items[i : i + size] for i in range(0, len(items), size))


if __name__ == "__main__":
    main()
