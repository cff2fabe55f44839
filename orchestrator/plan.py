"""Will it fit, and how fast: memory of each GPU and time of a step, predicted before anything starts.

Nothing is started, no data is read; of the base only its config is needed.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.base.empty import bytes_of
from orchestrator.config import Classification, Method, Run, Search
from orchestrator.errors import OutOfMemoryError
from orchestrator.methods import method_of
from orchestrator.plan_device import Device
from orchestrator.search.size import run_of, size_pack
from orchestrator.train.devices import step_seconds
from orchestrator.train.estimate import Estimator, Memory, Shape, estimator_of
from orchestrator.train.task import uses_encoder
from orchestrator.train.zero import choose_stage

_USABLE = 0.97
"""Share of a device that a run may fill."""
_GAIN = 0.97
"""A larger pass is proposed where it takes at most this share of the time per token."""
_MOST_ROWS = 64


@dataclass(frozen=True)
class Option:
    """One way to train."""

    slots: int
    """Deltas at once."""
    stage: int
    """ZeRO stage."""
    rows_per_pass: int
    recompute: bool
    quantize: str
    memory: Memory
    fits: bool
    tokens_per_pass: int
    """Of one device."""
    passes: int
    """Of a step on each device, at most: where each sample has a row to itself."""
    seconds: tuple[float, float] | None
    """Range of a pass's time; None where the device's speed is not known."""


@dataclass(frozen=True)
class Plan:
    """What was predicted."""

    name: str
    kind: str
    """``run`` or ``search``."""
    method: str
    device: Device
    asked: Option
    """As the file says."""
    proposed: Option | None
    """What would be better; None where nothing is, or nothing fits."""
    overrides: tuple[str, ...]
    """What of the file to change for it."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``; bytes and seconds."""
        return {
            "name": self.name,
            "kind": self.kind,
            "method": self.method,
            "device": self.device.as_dict(),
            "asked": _plain(self.asked),
            "proposed": None if self.proposed is None else _plain(self.proposed),
            "overrides": list(self.overrides),
            "notes": list(self.notes),
        }


def _plain(option: Option) -> dict[str, Any]:
    memory = {**asdict(option.memory), "allocated": option.memory.allocated, "needed": option.memory.needed}
    return {**asdict(option), "memory": memory, "seconds": option.seconds and list(option.seconds)}


def plan(work: Run | Search, device: Device) -> Plan:
    """Predict.

    Args:
        work: a run or a search.
        device: what it would run on; its count is the number of workers.

    Raises:
        MantaError: the base is not there, or the method does not fit it.
    """
    # Random weights: of a base on the hub nothing but its config is fetched then.
    light = work.model_copy(update={"base": work.base.model_copy(update={"random_init": 0})})
    return _plan_search(light, device) if isinstance(light, Search) else _plan_run(light, device)


# ---- a run


def _plan_run(run: Run, device: Device) -> Plan:
    asked = _option(run, device, rows=run.train.rows_per_pass, recompute=run.train.recompute)
    best = _best(run, device, asked)
    overrides = tuple(_changes(run, asked, best)) if best else ()
    if device.count != run.cluster.workers.min:
        overrides = (f"cluster.workers={device.count}", *overrides)
    notes = _notes(run, device)
    if best is None and not asked.fits:
        notes = (*notes, "nothing that was tried fits: take a smaller base, shorter rows (data.length), or more GPUs")
    changed = best is not None and bool(tuple(_changes(run, asked, best)))
    return Plan(run.name, "run", run.method.type, device, asked, best if changed else None, overrides, notes)


def _option(run: Run, device: Device, *, rows: int, recompute: bool, stage: int | None = None) -> Option:
    made = _estimator(run, device)
    if stage is None:
        held = bytes_of(made.model(frozenset()))
        stage = choose_stage(run.cluster.zero, held=held, memory=device.memory, ranks=device.count)
    shape = Shape(rows, run.data.length, recompute, _packed(run), stage, device.count)
    return _priced(run, made, (run.method,), shape, device)


def _priced(run: Run, made: Estimator, slots: tuple[Method, ...], shape: Shape, device: Device) -> Option:
    memory, seconds = made.memory(slots, shape), None
    if device.kind is not None:
        work = made.footprint(slots, shape).work
        room = memory.needed + memory.graphs <= _USABLE * device.memory
        seconds = step_seconds(device.kind, work, passes=1, graphed=room and made.graphed(slots, shape))
    return Option(
        slots=len(slots),
        stage=shape.stage,
        rows_per_pass=shape.rows,
        recompute=shape.recompute,
        quantize=made.base.quantize,
        memory=memory,
        fits=memory.needed <= _USABLE * device.memory,
        tokens_per_pass=shape.rows * shape.length,
        passes=-(-run.train.batch_size * len(slots) // (device.count * shape.rows)),
        seconds=seconds,
    )


def _best(run: Run, device: Device, asked: Option) -> Option | None:
    """The fastest way that fits; plain first, then with recomputation, then sharded, then on a base of 4 bits."""
    stages = [asked.stage]
    if run.cluster.zero.stage == "auto" and device.count > 1 and not run.method.whole_base and asked.stage != 3:
        stages.append(3)
    bases = [run]
    if run.base.quantize == "none" and not run.method.whole_base and run.method.type != "full":
        bases.append(run.model_copy(update={"base": run.base.model_copy(update={"quantize": "nf4"})}))
    for candidate in bases:
        for stage in stages:
            for recompute in (False, True):
                if found := _rows(candidate, device, recompute, stage):
                    return found
    return None


def _rows(run: Run, device: Device, recompute: bool, stage: int) -> Option | None:
    """The smallest passes that are about as fast as any that fit."""
    best, rows = None, 1
    most = min(_MOST_ROWS, -(-run.train.batch_size // device.count))
    while rows <= most:
        found = _option(run, device, rows=rows, recompute=recompute, stage=stage)
        if not found.fits:
            break
        if best is not None and _per_token(found) > _GAIN * _per_token(best):
            break
        best, rows = found, 2 * rows
    return best


def _per_token(option: Option) -> float:
    """Where the speed is not known a larger pass counts as faster up to some thousand tokens."""
    if option.seconds is None:
        return 1 / min(option.tokens_per_pass, 8192)
    return sum(option.seconds) / option.tokens_per_pass


def _changes(run: Run, asked: Option, best: Option) -> Iterator[str]:
    if best.quantize != asked.quantize:
        yield f"base.quantize={best.quantize}"
    if best.stage != asked.stage:
        yield f"shard={best.stage}"
    known = asked.seconds is not None and best.seconds is not None
    better = not asked.fits or (known and _per_token(best) < _GAIN * _per_token(asked))
    if best.rows_per_pass != asked.rows_per_pass and better:
        yield f"train.rows_per_pass={best.rows_per_pass}"
    if best.recompute != asked.recompute and better:
        yield f"train.recompute={str(best.recompute).lower()}"


# ---- a search


def _plan_search(search: Search, device: Device) -> Plan:
    run = run_of(search)
    made = _estimator(run, device)
    held = bytes_of(made.model(frozenset()))
    stage = choose_stage(search.cluster.zero, held=held, memory=device.memory, ranks=device.count)
    notes = _notes(run, device)

    def sized(work: Search) -> Option:
        found = size_pack(work, device.memory, gpu=device.gpu, ranks=device.count, stage=stage, estimator=made)
        shape = Shape(found.rows_per_pass, run.data.length, run.train.recompute, _packed(run), stage, device.count)
        shape = replace(shape, in_order=len(search.methods) == 1, keep_gradients=False)
        few = _priced(run, made, (found.dearest,) * min(4, found.slots), shape, device)
        fits = found.memory.needed <= _USABLE * device.memory
        passes = -(-run.train.batch_size * found.slots // (device.count * found.rows_per_pass))
        return replace(few, slots=found.slots, memory=found.memory, fits=fits, passes=passes)

    asked = sized(search)
    best: Option | None = asked
    if not asked.fits:
        packs = search.packs.model_copy(update={"slots": "auto"})
        try:
            best = sized(search.model_copy(update={"packs": packs}))
        except OutOfMemoryError as e:
            best, notes = None, (*notes, str(e))
    overrides = () if best is None else (f"packs.slots={best.slots}", f"train.rows_per_pass={best.rows_per_pass}")
    kinds = ", ".join(dict.fromkeys(str(m["type"]) for m in search.methods))
    note = "each slot is taken to hold the dearest point of the space, so that whatever is drawn fits"
    return Plan(
        search.name, "search", kinds, device, asked, best if best is not asked else None, overrides, (*notes, note)
    )


# ---- both


def _estimator(run: Run, device: Device) -> Estimator:
    key = f"{run.base!r} {run.task!r} {device.gpu}"
    if key not in device.estimators:
        workspace = device.kind.workspace if device.kind else 64 * 2**20
        encoder = uses_encoder(run)
        device.estimators[key] = estimator_of(run, gpu=device.gpu, encoder=encoder, workspace=workspace)
    return device.estimators[key]


def _packed(run: Run) -> bool:
    return run.data.packing and not isinstance(run.task, Classification)


def _notes(run: Run, device: Device) -> tuple[str, ...]:
    notes = []
    if device.kind is None:
        notes.append("step time: unknown; nothing was measured on this device")
    elif not device.kind.measured:
        notes.append(f"step time: the model was checked on an H200; of {device.kind.name} only the data sheet is known")
    if method_of(run.method).importance_samples(run.method):
        notes.append("choose: fisher takes the gradients of whole weights once, before the first step; not counted")
    if run.cluster.zero.stage == 3 and device.count == 1:
        notes.append("shard=3 with one worker shards nothing; on a GPU it was seen to hold 11 to 16 GiB more")
    return tuple(notes)
