"""Studies for tests, told to ``Study`` event by event as a search would."""

import math
from typing import Any

from orchestrator.config import Run
from orchestrator.config.search import Search
from orchestrator.search.study import Study

HOSTILE = "<script>document.title='taken'</script> & \"quotes\" </td> <img src=x onerror=alert(1)> $body ${plotly} 100%"
POINTS: list[dict[str, Any]] = [
    {"method": "lora", "lora.rank": 4, "lora.train.lr": 3e-3},
    {"method": "lora", "lora.rank": 16, "lora.train.lr": 1e-3},
    {"method": "lora", "lora.rank": 64, "lora.train.lr": 3e-2, "lora.targets": '["q_proj", "v_proj"]'},
    {"method": "bottleneck", "bottleneck.size": 16, "bottleneck.train.lr": 1e-3},
    {"method": "bottleneck", "bottleneck.size": 64, "bottleneck.train.lr": 2e-3},
    {"method": "prompt", "prompt.tokens": 20, "prompt.train.lr": 3e-2},
    {"method": "prompt", "prompt.tokens": 8, "prompt.train.lr": 1e-2},
    {"method": "bitfit", "bitfit.train.lr": 3e-3},
]


SIZES = ("rank", "size", "tokens")


def study(count: int = 24, *, hostile: int | None = 5, objective: tuple[str, ...] = ("eval_loss",)) -> Study:
    """A study of ``count`` trials on four slots; every fifth fails, every third is stopped."""
    made = Study(
        Search.model_validate({"name": "orders", "objective": list(objective), "budget": {"trials": count or 1}})
    )
    if not count:
        return made
    free = [0.0] * 4
    for n in range(count):
        slot = free.index(min(free))
        begin = free[slot]
        point = dict(POINTS[n % len(POINTS)])
        point[f"{point['method']}.train.lr"] *= 1 + n / 10
        point["train.batch_size"] = (4, 8, 16)[n % 3]
        free[slot] = begin + _tell(made, n, point, begin, hostile=n == hostile)
    made.hear("", "over", {"reason": f"{count} trials are done"}, 1_700_000_001 + max(free))
    return made


def _tell(made: Study, n: int, point: dict[str, Any], begin: float, *, hostile: bool) -> float:
    trial, at = f"t{n:05d}", 1_700_000_000 + begin
    kind = point["method"]
    method = {"type": kind, **{name: point[key] for key in point if (name := key.removeprefix(f"{kind}.")) in SIZES}}
    train = {"lr": point[f"{kind}.train.lr"], "batch_size": point["train.batch_size"], "steps": 40}
    run = Run.model_validate({"name": "orders", "method": method, "train": train})
    settings = run.model_dump(mode="json")
    made.hear(trial, "queued", {"number": n, "params": point, "lane": "packed", "run": settings}, 1_700_000_000)
    sized = {"parameters": 1000 * (n + 1) ** 2, "memory": 2**20 * (n + 1), "latency": 1e-4 * (n % 5 + 1)}
    made.hear(trial, "joined", {"step": 0, "total": 40, "pack": "pack-0", **sized}, at)
    last = 15 if n % 5 == 0 or hostile else 20 if n % 3 == 0 else 40
    for step in range(1, last + 1):
        loss = 1 + n % 7 / 10 + 3 * math.exp(-step / 10)
        values = {"step": step, "total": 40, "loss": loss, "tokens": 512 * step}
        made.hear(trial, "step", values, at + step)
        if step % 10 == 0:
            made.hear(
                trial, "eval", {"step": step, "total": 40, "eval_loss": loss + 0.1, "accuracy": 1 / loss}, at + step
            )
    failed = {"why": "failed", "reason": HOSTILE if hostile else "the loss was not finite 5 times in a row"}
    ended = failed if last == 15 else {"why": "withdrawn"} if last == 20 else {"why": "finished"}
    made.hear(trial, "ended", ended, at + last)
    return float(last)
