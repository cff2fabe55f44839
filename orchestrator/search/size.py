"""How many trials train at once on one base: as many as a device has memory for, at the dearest point of the space.

The dearest point of each method takes the high end of every number, and of other choices the one that takes most
memory. So a pack that is sized here holds whatever the sampler draws; one of cheaper trials leaves memory unused.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.config import Method, Run, Search
from orchestrator.errors import ConfigError, OutOfMemoryError
from orchestrator.methods import method_of
from orchestrator.search.points import Dimension, dimensions, labels, plain
from orchestrator.search.space import METHOD, trial_run
from orchestrator.train.estimate import Estimator, Memory, Shape, estimator_of
from orchestrator.train.task import uses_encoder

MOST_SLOTS = 64
"""Of a pack; more add no speed, and each slot costs time where slots come and go."""
FULL_TOKENS = 8192
"""Tokens of a pass that keep a large GPU busy; longer passes hardly gain."""
_USABLE = 0.95
"""Share of a device that a pack is to fill."""
_MOST_COMBINED = 12
"""Combinations of choices that are not numbers, of which each is rehearsed."""


@dataclass(frozen=True)
class Pack:
    """Size of a pack."""

    slots: int
    """Trials at once."""
    rows_per_pass: int
    """Rows of a pass, of all slots together."""
    dearest: Method
    """What each slot was taken to hold."""
    memory: Memory
    """Of a device, with all slots in use."""


def size_pack(
    search: Search,
    device_memory: int,
    *,
    gpu: bool = True,
    ranks: int = 1,
    stage: int = 0,
    methods: Sequence[Method] | None = None,
    estimator: Estimator | None = None,
) -> Pack:
    """The largest pack that fits. Pure: contacts nothing, starts nothing.

    Args:
        search: its base, data and training; ``packs.slots`` where it is a number.
        device_memory: bytes of one device.
        gpu: whether it is one of a GPU.
        ranks: devices that share a pack.
        stage: ZeRO stage.
        methods: what slots may hold, such as those of one lane; default: the dearest points of the search's space,
            whatever lane they are of.
        estimator: of this base, where there is one already.

    Raises:
        OutOfMemoryError: not one trial fits.
    """
    sample = run_of(search)
    made = estimator or estimator_of(sample, gpu=gpu, encoder=uses_encoder(sample))
    runs = dearest_runs(search, made)
    known = methods if methods is not None else [run.method for run in runs]
    if not (known := [m for m in known if method_of(m).packs]):
        raise ConfigError("none of the search's methods trains beside others; there is no pack to size")
    length = max(run.data.length for run in runs)
    one = Shape(
        rows=1,
        length=length,
        recompute=search.train.recompute,
        packed=search.data.packing,
        stage=stage,
        ranks=ranks,
        in_order=len(known) == 1,
        keep_gradients=False,
    )
    dearest = max(known, key=lambda m: _cost(m, length, made)) if len(known) > 1 else known[0]
    return _fit(search, made, dearest, one, round(device_memory * _USABLE))


def _fit(search: Search, made: Estimator, dearest: Method, one: Shape, room: int) -> Pack:
    def needed(slots: int, rows: int) -> int:
        return made.memory((dearest,) * slots, replace(one, rows=rows)).needed

    # Memory grows evenly with slots and with rows, so three passes tell of all.
    least = needed(2, 2)
    each_row = max(1, (needed(2, 4) - least) // 2)
    each_slot = max(1, (needed(4, 4) - least - 2 * each_row) // 2)
    fixed = least - 2 * each_slot - 2 * each_row
    if fixed + each_slot + each_row > room:
        raise OutOfMemoryError(
            f"a pack of one {dearest.type} trial at rows of {one.length} tokens needs "
            f"{(fixed + each_slot + each_row) / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are there. Hold the base in "
            "fewer bits (base.quantize=nf4), set train.recompute=true, or lower data.length"
        )
    asked = search.packs.slots if search.packs.slots != "auto" else None
    most = asked or min(MOST_SLOTS, search.budget.trials or MOST_SLOTS)
    given = search.train.rows_per_pass if "rows_per_pass" in search.train.model_fields_set else None
    slots = rows = 1
    for count in range(1, most + 1):
        wanted = given or min(count, max(1, FULL_TOKENS // one.length))
        if fixed + count * each_slot + wanted * each_row > room:
            break
        slots, rows = count, wanted
    slots = asked or slots
    small = max(2, min(slots, 4))
    found = made.memory((dearest,) * small, replace(one, rows=rows))
    more = (slots - small) * each_slot
    return Pack(slots, rows, dearest, replace(found, delta=found.delta + more))


def run_of(search: Search) -> Run:
    """Any run of the search, for what all of them share."""
    return trial_run(search, _high(labels(search)[0], dimensions(search, 0), {}), search.name)


def dearest_runs(search: Search, made: Estimator) -> list[Run]:
    """Of each method the run that takes most memory."""
    out = []
    for number, label in enumerate(labels(search)):
        drawn = dimensions(search, number)
        odd = [d for d in drawn if d.range.form == "choice" and not all(map(_number, d.range.values))]
        ways = itertools.product(*([(d.name, plain(v)) for v in d.range.values] for d in odd))
        runs = [
            trial_run(search, _high(label, drawn, dict(way)), search.name)
            for way in itertools.islice(ways, _MOST_COMBINED)
        ]
        out.append(max(runs, key=lambda r: _cost(r.method, r.data.length, made)) if len(runs) > 1 else runs[0])
    return out


def _cost(method: Method, length: int, made: Estimator) -> int:
    return made.memory((method,), Shape(1, length, keep_gradients=False)).needed


def _high(label: str, drawn: Sequence[Dimension], chosen: dict[str, object]) -> dict[str, object]:
    """A point: what is chosen, the high end of all numbers, the first of other choices."""
    point: dict[str, object] = {METHOD: label}
    for d in drawn:
        numbers = [v for v in d.range.values if _number(v)]
        high = max(numbers) if len(numbers) == len(d.range.values) else plain(d.range.values[0])
        point[d.name] = chosen.get(d.name, high)
    return point


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
