"""Many trials on one GPU: one by one with peft, one by one with ours, side by side as processes, and packed.

    python jobs/bench/pack.py --log out/pack.jsonl --out jobs/bench/pack.md
    python jobs/bench/pack.py --log out/pack.jsonl --parts peft-8b,ours-8b     # some of it: at most minutes a part
    python jobs/bench/pack.py --tiny                                           # all of it on a CPU, to try it out

A trial is LoRA of rank 16 on all linear layers, AdamW, of an NF4 base with random weights. Steps per second are
measured over some seconds each; makespans are computed from them and from the measured start-up, except for one pack
that is timed whole. What is in ``--log`` is not measured again: kill it and start it anew.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = ("1x256", "1x512", "4x512")
"""Sequences x tokens of one trial's step."""
SLOTS = (8, 16, 32)
PARTS = ("peft", "ours", "mixed", "many", "start", "whole")
WHOLE = "1x512"
"""Size of the pack that is timed whole, and of the mixed one."""


def main() -> None:
    args = arguments()
    if args.measure:
        measure(args)
        return
    rows = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
    for part in args.parts.split(","):
        kind, _, shape = part.partition("-")
        if kind not in PARTS or shape not in args.shapes.split(","):
            sys.exit(f"--parts: {part!r} is none of {', '.join(all_parts(args))}")
        if any(row["part"] == part and "failed" not in row for row in rows):
            print(f"{part}: in the log", flush=True)
            continue
        begin = time.monotonic()
        made = run_part(args, part, rows)
        rows = [row for row in rows if row["part"] != part] + made
        args.log.parent.mkdir(parents=True, exist_ok=True)
        args.log.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{part}: {time.monotonic() - begin:.0f} s, {len(made)} rows", flush=True)
    from pack_table import table

    text = table(args, rows)
    print(text)
    if args.out:
        args.out.write_text(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8b,1b", help="bases (default: 8b,1b)")
    parser.add_argument("--sizes", default=",".join(SIZES), help="sequences x tokens of a trial's step")
    parser.add_argument("--slots", default=",".join(map(str, SLOTS)), help="trials of a pack (default: 8,16,32)")
    parser.add_argument("--parts", help="what to measure now, such as peft-8b,ours-1b (default: all)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--pass-tokens", type=int, default=16384, help="tokens of a pack's forward pass")
    parser.add_argument("--most", type=int, default=14, help="processes side by side, at most")
    parser.add_argument("--whole-steps", type=int, default=40, help="steps of the pack that is timed whole")
    parser.add_argument("--trial-steps", type=int, default=500, help="steps of a trial, for makespans")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--device-name", help="what the table calls the machine")
    parser.add_argument("--out", type=Path, help="markdown table to write")
    parser.add_argument("--log", type=Path, default=Path("out/pack.jsonl"), help="results so far")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, seconds on a CPU")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--place", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.slots = ",".join(map(str, sorted(map(int, args.slots.split(",")))))  # a pack grows, it does not shrink
    if args.tiny:
        args.shapes, args.device, args.seconds, args.slots, args.most = "tiny", "cpu", 0.3, "2,4", 2
        args.sizes, args.whole_steps, args.trial_steps = "1x32,1x64,4x64", 3, 50
    args.parts = args.parts or ",".join(all_parts(args))
    return args


def all_parts(args: argparse.Namespace) -> list[str]:
    """Every part, of the first base first."""
    return [f"{part}-{shape}" for shape in args.shapes.split(",") for part in PARTS]


def whole_size(args: argparse.Namespace) -> str:
    """The size that is timed whole."""
    sizes = args.sizes.split(",")
    return WHOLE if WHOLE in sizes else str(sizes[0])


def run_part(args: argparse.Namespace, part: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A part in processes of its own."""
    kind, shape = part.split("-")
    with tempfile.TemporaryDirectory(prefix="manta-pack-") as scratch:
        if kind == "many":
            from pack_many import many

            made = many(args, shape, Path(scratch), [row for row in rows if row["part"] == f"peft-{shape}"])
        else:
            begin = time.time()
            done = subprocess.run(command(args, part, Path(scratch), {}), capture_output=True, text=True)
            made = results(Path(scratch))
            if done.returncode:
                print(done.stdout[-2000:], done.stderr[-6000:], file=sys.stderr)
                made.append({"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:200]})
            for row in made:
                if "ready_at" in row:
                    row["startup_s"] = row.pop("ready_at") - begin
                if "ended_at" in row:
                    row["wall_s"] = row.pop("ended_at") - begin
    return [{"part": part, **row} for row in made]


def command(args: argparse.Namespace, part: str, scratch: Path, place: dict[str, Any]) -> list[str]:
    """This script for one measurement."""
    flags = ["seconds", "pass-tokens", "whole-steps", "sizes", "slots", "device", "most"]
    given = [text for name in flags for text in (f"--{name}", str(getattr(args, name.replace("-", "_"))))]
    given += ["--measure", part, "--scratch", str(scratch), "--place", json.dumps(place)]
    return [sys.executable, __file__, *given]


def results(scratch: Path) -> list[dict[str, Any]]:
    """What measurements have left."""
    return [json.loads(line) for path in sorted(scratch.glob("result*.jsonl")) for line in path.open()]


def keep(args: argparse.Namespace, row: dict[str, Any], name: str = "") -> None:
    """Leave a result for the parent."""
    with (args.scratch / f"result{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def measure(args: argparse.Namespace) -> None:
    """One measurement, in this process."""
    part, args.shape = args.measure.split("-")
    args.side, args.steps = "peft" if part in ("peft", "many") else "ours", 12
    if part == "peft":
        from pack_many import alone

        alone(args)
    elif part == "many":
        from pack_many import one_of_many

        one_of_many(args, json.loads(args.place))
    else:
        import pack_ours

        getattr(pack_ours, part)(args)


def timed(step: Any, seconds: float, sync: Any, warm: int = 4) -> tuple[float, int]:
    """Seconds of one step, and over how many: after some to warm up, for so many seconds, and five steps at least."""
    for _ in range(warm):
        step()
    sync()
    begin, count = time.perf_counter(), 0
    while count < 5 or time.perf_counter() - begin < seconds:
        step()
        count += 1
        sync()
    return (time.perf_counter() - begin) / count, count


if __name__ == "__main__":
    main()
