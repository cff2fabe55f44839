"""The other side of pack.py: peft's trials one by one, and side by side as processes that share the GPU."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu import Size, linear_weights
from pack import command, keep, results, timed

SPARE_GIB = 2.0
"""Left free, so that no process fails half-way."""
CONTEXT_GIB = 0.6
"""Of each process's CUDA context."""
_LONGEST_S = 420.0


def alone(args: argparse.Namespace) -> None:
    """One trial at a time, every size."""
    import torch
    from gpu_peft import Theirs

    side = Theirs(args)
    cuda = args.device == "cuda"
    for number, text in enumerate(args.sizes.split(",")):
        step = side.step_of(args, text)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if number == 0:
            step()
            keep(args, {"what": "ready", "ready_at": time.time()})
        seconds, count = timed(step, args.seconds, torch.cuda.synchronize if cuda else lambda: None)
        reserved = torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0
        keep(args, {"what": "peft", "reserved_gib": reserved, **_row(args, text, seconds, count)})


def _row(args: argparse.Namespace, text: str, seconds: float, count: int) -> dict[str, Any]:
    size = Size.of(text)
    tokens = size.rows * size.length / seconds
    useful = 4e-12 * linear_weights(args.shape) * tokens
    return {"size": text, "slots": 1, "step_s": seconds, "steps": count, "tokens_per_s": tokens, "tflops": useful}


def many(args: argparse.Namespace, shape: str, scratch: Path, solo: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many processes as fit at each size, fewer from size to size; rows of all of them together."""
    needs = {row["size"]: row["reserved_gib"] + CONTEXT_GIB for row in solo if row.get("what") == "peft"}
    if not needs:
        return [{"failed": f"how many processes fit is read off part peft-{shape}, which is to be measured first"}]
    # A base is loaded whole before it is quantized, one process at a time.
    room = _gpu_gib() - SPARE_GIB if args.device == "cuda" else 1e9
    fits = {size: max(1, min(args.most, int(room // need))) for size, need in needs.items()}
    order = sorted(fits, key=lambda size: (-fits[size], needs[size]))
    place = {"order": order, "fits": fits}
    children = []
    for index in range(fits[order[0]]):
        out = (scratch / f"{index}.log").open("w")
        line = command(args, f"many-{shape}", scratch, {**place, "index": index})
        children.append(subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT))
    end = time.monotonic() + _LONGEST_S
    for child in children:
        try:
            child.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
    made = []
    for size in order:
        mine = [row for row in results(scratch) if row["size"] == size]
        if len(mine) < fits[size]:
            told = [(scratch / f"{index}.log").read_text()[-400:] for index in range(fits[order[0]])]
            print(*told, sep="\n", file=sys.stderr)
            why = f"{fits[size] - len(mine)} of {fits[size]} processes did not get there"
            made.append({"what": "many", "size": size, "processes": fits[size], "oom": why})
            continue
        rate = sum(row["tokens_per_s"] for row in mine)
        made.append(
            {
                "what": "many",
                "size": size,
                "processes": len(mine),
                "steps": sum(row["steps"] for row in mine),
                "tokens_per_s": rate,
                "step_s": len(mine) * Size.of(size).rows * Size.of(size).length / rate,
                "tflops": 4e-12 * linear_weights(shape) * rate,
                "gib": len(mine) * needs[size],
            }
        )
    return made


def _gpu_gib() -> float:
    line = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    return float(said.splitlines()[0]) / 1024


def one_of_many(args: argparse.Namespace, place: dict[str, Any]) -> None:
    """One process: loads when it is its turn, and steps while the others do."""
    import torch

    index, parent = place["index"], args.scratch
    args.scratch = parent / f"home-{index}"
    args.scratch.mkdir()
    _wait(parent, [f"loaded-{index - 1}"] if index else [])
    from gpu_peft import Theirs

    side = Theirs(args)
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    (parent / f"loaded-{index}").touch()
    for text in place["order"]:
        count = place["fits"][text]
        if index >= count:
            return  # the others need its memory
        step = side.step_of(args, text)
        for _ in range(3):
            step()
        (parent / f"ready-{text}-{index}").touch()
        _wait(parent, [f"ready-{text}-{other}" for other in range(count)])
        begin, steps = time.perf_counter(), 0
        # Fewer would be an edge: all step for longer than the slowest takes for some steps.
        while steps < 3 or time.perf_counter() - begin < 2 * args.seconds:
            step()
            if cuda:
                torch.cuda.synchronize()
            steps += 1
        seconds = (time.perf_counter() - begin) / steps
        row = _row(args, text, seconds, steps)
        args.scratch, home = parent, args.scratch
        keep(args, row, name=f"-{index}")
        args.scratch = home
        (parent / f"done-{text}-{index}").touch()
        _wait(parent, [f"done-{text}-{other}" for other in range(count)])
        del step
        if cuda:
            torch.cuda.empty_cache()


def _wait(folder: Path, names: list[str]) -> None:
    """Until all of these are there."""
    end = time.monotonic() + _LONGEST_S
    while not all((folder / name).exists() for name in names):
        if time.monotonic() > end:
            raise TimeoutError(json.dumps([n for n in names if not (folder / n).exists()]))
        time.sleep(0.02)
