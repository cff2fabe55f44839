"""A run before it starts: its settings, samples with the trained tokens marked, counts, sizes, and where it would run.

Starts nothing, contacts no cluster, and writes nothing but the cache of tokenized samples.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from orchestrator.base import compute_dtype, load_tokenizer
from orchestrator.base.encoder import pooler
from orchestrator.base.load import empty_model
from orchestrator.base.memory import host_memory
from orchestrator.base.model import count_weights
from orchestrator.config import CausalLM, Classification, Method, Run, Task, home
from orchestrator.config.data import Source
from orchestrator.data import Prepared, Report, Sample, deal, pack
from orchestrator.delta import Delta, load_delta, redact
from orchestrator.errors import ConfigError, MantaError
from orchestrator.methods import Bank, Scope, head_parameters, method_of, trained_parameters
from orchestrator.plan import plan
from orchestrator.plan_device import Device, known_gpu
from orchestrator.plan_show import step_time, verdict
from orchestrator.preview_samples import CONTROL, print_samples
from orchestrator.registry.address import resolve_address
from orchestrator.train.devices import Gpu
from orchestrator.train.fill import fill_slot
from orchestrator.train.setup import total_steps
from orchestrator.train.task import prepare_run, task_of, uses_encoder
from orchestrator.train.zero import choose_stage, held_bytes

SHOWN = 3
"""Samples, and reasons for left-out records, that are shown."""
LABELS = 10
"""Labels that are named."""
LOOKED_AT = 10_000
"""Most samples whose lengths are looked at; of a streamed set, one step's are."""
Fact = tuple[str, str]
"""A line of the report: label and value."""


def preview(run: Run, *, address: str | None = None, console: Console | None = None) -> None:
    """Show what a run would do.

    Args:
        run: the run.
        address: the Ray cluster it would run on; it is named, not asked.
        console: where to print. On a terminal trained tokens are coloured, elsewhere they stand between « and ».

    Raises:
        MantaError: what would end the run before its first step, as far as it can be seen from here.
    """
    console = console or Console()
    if run.data.streaming and run.train.steps is None:
        raise ConfigError("data.streaming: a streamed set has no known length; give train.steps")
    place = _place(run, address)
    sizes = measure(run, gpu=place.gpu)
    tokenizer = load_tokenizer(run.base)
    data = prepare_run(run, tokenizer, _parent(run))
    if isinstance(data.task, Classification):
        sizes = replace(sizes, trained=sizes.trained + head_parameters(data.task, sizes.scope))
    size = data.train.size
    ahead = data.train.take(max(run.train.batch_size, SHOWN if size is None else min(size, LOOKED_AT)))
    _print(console, "Run", _settings(run, data, sizes.method))
    print_samples(console, tokenizer, ahead[: SHOWN if size is None else min(size, SHOWN)], data.task)
    _print(console, "Data", _counts(run, data, ahead, tokenizer.pad_token_id, sizes.method))
    _print(console, "Parameters", _parameters(run, sizes))
    _print(console, "Launch", _launch(run, place, sizes))
    _print(console, "Plan", _plan(run, place, sizes))


def _print(console: Console, title: str, facts: Iterable[Fact]) -> None:
    console.print(Text(title, "bold"))
    for label, value in facts:
        line = Text(f"  {label:<12} ", "cyan")
        line.append(value.translate(CONTROL), "red" if label == "problem" else "default")
        console.print(line, soft_wrap=True, highlight=False)
    console.print()


# ---- the run


def _settings(run: Run, data: Prepared, method: Method) -> Iterator[Fact]:
    train, base = run.train, run.base
    yield "name", run.name
    revision = f" at {base.revision}" if base.revision else ""
    yield "base", f"{base.id}{revision}, held in {base.quantize}, computed in {base.precision}"
    knobs = {k: v for k, v in method.model_dump(mode="json").items() if k != "type"}
    said = ", ".join(f"{k} {_plain(v)}" for k, v in knobs.items())
    yield "method", f"{method.type}: {said}"
    if isinstance(data.task, Classification):
        labels = data.task.labels or ()
        more = f" and {len(labels) - LABELS:,} more" if len(labels) > LABELS else ""
        named = ", ".join(labels[:LABELS]) + more
        yield "task", f"classification, pooling {data.task.pooling}, {len(labels):,} labels: {named}"
    if train.init_from:
        yield "start", f"goes on from {train.init_from}"
    yield "data", _named(run.data.train)
    if run.data.eval or run.data.eval_fraction:
        yield "held out", _named(run.data.eval) if run.data.eval else f"{run.data.eval_fraction:.1%} of data"
    epochs = f"{train.epochs:g} epoch{'s' if train.epochs != 1 else ''} of {data.train.size or 0:,} samples"
    yield "steps", f"{total_steps(run, data):,} ({'train.steps' if train.steps else epochs})"
    yield "batch", f"{train.batch_size:,} samples per step over all workers"
    yield "lr", f"{run.lr:g}, {train.schedule}, {train.warmup:.0%} warm-up; seed {train.seed}"
    address = resolve_address(run.tracking.uri)
    yield "tracking", f"{redact(address.shown)}, experiment {run.tracking.experiment}"
    alias = f"@{run.tracking.alias}" if run.tracking.alias else ""
    yield "register", f"{run.tracking.register_as or run.name}{alias}"


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _named(sources: Iterable[Source]) -> str:
    return ", ".join(redact(s.path) + (f"[{s.split}]" if s.split != "train" else "") for s in sources)


# ---- counts


def _counts(run: Run, data: Prepared, ahead: list[Sample], pad_id: int, knobs: Method) -> Iterator[Fact]:
    report, size = data.report, data.train.size
    so_far = "" if size is not None else f" among the first {report.records:,} records of the stream"
    yield "samples", f"{report.samples:,}{so_far}"
    yield "tokens", _tokens(report, data.task)
    all_seen = size is not None and len(ahead) >= size and len(report.sources) == 1
    seen = "" if all_seen else f" among the {len(ahead):,} that come first"
    yield "longest", f"{max(len(s.tokens) for s in ahead):,} tokens{seen}"
    whole = "" if report.eval is None or run.data.eval else ", held-out ones included"
    yield "truncated", f"{report.truncated:,}{whole} (data.length {run.data.length:,})"
    yield "skipped", f"{report.skipped:,} malformed, {report.dropped:,} without a trained token{whole}"
    for reason in report.reasons[:SHOWN]:
        yield "", redact(reason)
    if (more := report.skipped + report.dropped - SHOWN) > 0:
        yield "", f"and {more:,} more"
    if len(report.sources) > 1:
        for s in report.sources:
            passes = f", {s['passes']:.3g} times each in an epoch" if "passes" in s else ""
            yield "source", f"{s['share']:.1%} {redact(s['path'])}{passes}"
    yield "per step", _packed(run, ahead, pad_id, knobs)
    if (held := report.eval) is None:
        yield "eval", "none: the last delta is kept, not the best"
    else:
        out = f"; {held.truncated:,} truncated, {held.skipped + held.dropped:,} left out" if run.data.eval else ""
        targets = "" if isinstance(data.task, Classification) else f", {held.trained_tokens:,} of them trained"
        yield "eval", f"{held.samples:,} samples, {held.tokens:,} tokens{targets}{out}"
        for reason in held.reasons[:SHOWN]:
            yield "", redact(reason)


def _tokens(report: Report, task: Task) -> str:
    if isinstance(task, Classification):
        return f"{report.tokens:,}, one label for each sample"
    share = report.trained_tokens / report.tokens
    return f"{report.tokens:,}, {report.trained_tokens:,} of them trained ({share:.1%})"


def _packed(run: Run, ahead: list[Sample], pad_id: int, knobs: Method) -> str:
    """Rows and passes of a step, and what share of the positions holds tokens: a mean over the first steps."""
    method = method_of(knobs)
    leads = {0: (method.virtual_tokens(knobs), method.prefix_length(knobs))}
    batch, ranks, per_pass = run.train.batch_size, run.cluster.workers.min, run.train.rows_per_pass
    steps = [ahead[i : i + batch] for i in range(0, min(len(ahead), 8 * batch), batch)]
    steps = [s for s in steps if len(s) == batch] or steps
    rows = passes = positions = tokens = 0
    for samples in steps:
        packed = pack({0: samples}, length=run.data.length, packing=run.data.packing, leads=leads)
        rows += len(packed)
        tokens += sum(row.size for row in packed)
        for rank in range(ranks):
            mine = deal(packed, rank=rank, ranks=ranks, rows_per_pass=per_pass, pad_id=pad_id)
            passes += len(mine) if rank == 0 else 0
            positions += sum(b.tokens_BT.numel() for b in mine)
    count = f"{rows / len(steps):.3g} {'packed rows' if run.data.packing else 'rows of one sample'}"
    fill = tokens / positions
    return f"{count}, {fill:.0%} full; passes of each worker: {passes / len(steps):.3g}, of up to {per_pass} rows"


# ---- parameters


@dataclass(frozen=True)
class Sizes:
    """What a run would hold."""

    method: Method
    """The method, with the size in force."""
    sites: int
    """Modules that the delta acts on."""
    trained: int
    """Parameters of the delta, without a head of its own."""
    base: int
    """Parameters of the base."""
    layers: int
    """Of these, weights of the layers' linears, which ``base.quantize`` is about."""
    held: int
    """Bytes of the base as it is held, about."""
    fp32: bool
    """Whether the base computes in fp32."""
    scope: Scope
    """Names and sizes of the base's parts."""


def measure(run: Run, *, gpu: bool | None) -> Sizes:
    """Sizes, off the empty model; ``gpu`` None, where it is not known, counts as a GPU.

    Raises:
        MantaError: the base is not there, a target matches nothing, or the delta to go on from does not fit.
    """
    dtype = compute_dtype(run.base, "cpu" if gpu is False else "cuda")
    model = empty_model(run.base, dtype, encoder=uses_encoder(run))
    if isinstance(run.task, Classification) and run.task.pooling == "pooler":
        pooler(model)  # has it one?
    base, layers = count_weights(model)
    bank = Bank(model, base_id=run.base.id)
    knobs: Method = run.method
    parent = _parent(run)
    if parent is not None or not method_of(knobs).mixes:
        knobs = fill_slot(bank, 0, run, task_of(parent) if parent else CausalLM(), None, parent)
    if method_of(knobs).mixes:
        sites = list(method_of(knobs).sites(knobs, bank.scope))
        trained = trained_parameters(knobs, sites, bank.scope)
    else:
        sites, trained = bank.sites(0), sum(p.numel() for p in bank.parameters(0).values())
    return Sizes(
        method=knobs,
        sites=len(sites),
        trained=trained,
        base=base,
        layers=layers,
        held=held_bytes(run.base, parameters=base, linears=layers, itemsize=dtype.itemsize),
        fp32=dtype == torch.float32,
        scope=bank.scope,
    )


def _parent(run: Run) -> Delta | None:
    """The delta to go on from where it is a folder; the registry is not contacted for a name."""
    folder = Path(run.train.init_from or "").expanduser()
    return load_delta(folder) if run.train.init_from and folder.is_dir() else None


def _parameters(run: Run, sizes: Sizes) -> Iterator[Fact]:
    yield "trainable", f"{sizes.trained:,} in {sizes.sites} modules, {sizes.trained / sizes.base:.3%} of the base"
    if run.train.init_from and not Path(run.train.init_from).expanduser().is_dir():
        yield "", f"unless {run.train.init_from} has another size; the registry is asked at the start of the run"
    yield "delta file", f"about {_bytes(4 * sizes.trained)}"
    width = "fp32" if sizes.fp32 else "bf16"
    held = width
    if run.base.quantize != "none":
        held = f"{sizes.layers / sizes.base:.0%} {run.base.quantize}, rest {width}"
    yield "base size", f"{sizes.base:,} parameters, held in about {_bytes(sizes.held)} ({held})"


def _bytes(count: float) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count:.0f} bytes"


# ---- the launch


@dataclass(frozen=True)
class Place:
    """Where a run would go, as far as it is known without asking."""

    where: str
    """In words."""
    gpu: bool | None
    """Whether a worker gets a GPU; None where only the cluster knows."""
    memory: int | None = None
    """Bytes of one worker's device."""
    free: int | None = None
    """Of these, free ones."""
    problem: str | None = None
    """What the run asks for and this machine does not have."""
    kind: Gpu | None = None
    """Which GPU, where its speed is known."""


def _place(run: Run, address: str | None) -> Place:
    asked, workers = run.cluster.gpus_per_worker, run.cluster.workers.min
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        gpu = None if asked == "auto" else asked == 1
        return Place(f"the Ray cluster at {redact(address)}, which is not contacted", gpu)
    cores, gpus, (total, free) = os.cpu_count() or 1, torch.cuda.device_count(), host_memory()
    words = [f"{cores} cores", f"{total / 2**30:.1f} GiB", *([f"{gpus} GPUs"] if gpus else [])]
    where = f"a local cluster of this machine: {', '.join(words)}"
    started = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    if address is None and started.is_file():
        where = f"the Ray cluster that was started here, if it still runs, else {where}"
    gpu = gpus > 0 if asked == "auto" else asked == 1
    need = workers * run.cluster.cpus_per_worker
    problem = f"{workers} workers need {need:g} cores, this machine has {cores}" if need > cores else None
    if gpu and gpus < workers:
        problem = f"{workers} workers need a GPU each, this machine has {gpus}"
    if gpu:
        room = [torch.cuda.mem_get_info(i) for i in range(gpus)]
        least, whole = min(room, default=(None, None))
        return Place(where, gpu, whole, least, problem, known_gpu(torch.cuda.get_device_name(0)) if gpus else None)
    return Place(where, gpu, total // workers, free // workers, problem)


def _launch(run: Run, place: Place, sizes: Sizes) -> Iterator[Fact]:
    cluster = run.cluster
    least, most = cluster.workers.min, cluster.workers.max
    cpus = f"{cluster.cpus_per_worker:g} CPU"
    each = {True: f"{cpus} and 1 GPU", False: f"{cpus}, no GPU", None: f"{cpus}, and a GPU where the cluster has any"}
    counted = f"{least}" if least == most else f"{least} to {most}"
    yield "workers", f"{counted}, each with {each[place.gpu]}"
    stages = _stages(run, place, sizes)
    if len(stages) == 1:
        auto = " (auto)" if cluster.zero.stage == "auto" else ""
        yield "ZeRO stage", f"{stages[0]}{auto}: the base is {'sharded' if stages[0] == 3 else 'replicated'}"
    else:
        yield "ZeRO stage", f"auto: {stages[0]}, or {stages[1]} where the base fills over half of a worker's memory"
    for stage in stages:
        base, state = _share(run, sizes, stage)
        at = f" at stage {stage}" if len(stages) > 1 else ""
        off = " in host memory" if stage == 3 and cluster.zero.offload == "cpu" and place.gpu is not False else ""
        parts = (
            f"base {_bytes(base)}{off}, delta with gradient and optimizer {_bytes(state)}; activations: see the plan"
        )
        yield "per worker", f"about {_bytes(base + state)}{at}: {parts}"
        if place.free is not None and not off and base + state > place.free:
            advice = "hold the base in fewer bits (base.quantize=nf4) or shard it (cluster.workers, shard=3)"
            yield "problem", f"{_bytes(place.free)} are free for a worker; {advice}"
    yield "storage", redact(cluster.storage or str(home() / "storage"))
    yield "Ray", place.where
    if place.problem and not os.environ.get("MANTA_AUTOSCALING"):
        yield "problem", f"{place.problem}; name a larger cluster with --address, or ask for less"


def _stages(run: Run, place: Place, sizes: Sizes) -> list[int]:
    """The stage, or both where it depends on memory that only the workers know."""
    zero, ranks = run.cluster.zero, run.cluster.workers.min
    memories = (0, 1 << 62) if place.memory is None else (place.memory,)
    return sorted({choose_stage(zero, held=sizes.held, memory=m, ranks=ranks) for m in memories})


def _share(run: Run, sizes: Sizes, stage: int) -> tuple[float, float]:
    """Bytes of one worker: of the base; of the delta, its gradient and AdamW's two moments (fp32)."""
    ranks = run.cluster.workers.min
    moments = 8 / ranks if stage in (1, 2) else 8
    return sizes.held / ranks if stage == 3 else sizes.held, sizes.trained * (8 + moments)


# ---- the plan


def _plan(run: Run, place: Place, sizes: Sizes) -> Iterator[Fact]:
    """What ``manta plan`` says, in short."""
    if place.gpu is None or place.memory is None:
        yield "memory", "depends on the cluster's GPUs; manta plan --gpu NAME says it of one kind"
        return
    device = Device("this machine", place.gpu, place.memory, run.cluster.workers.min, place.kind)
    try:
        made = plan(run.model_copy(update={"method": sizes.method}), device)
    except MantaError as error:
        yield "none", str(error)
        return
    memory = made.asked.memory
    parts = f"{_bytes(memory.kept)} of activations, {_bytes(memory.base)} of base"
    yield "memory", f"{_bytes(memory.needed)} of each worker's {_bytes(place.memory)}: {parts}"
    yield "fits" if made.asked.fits else "problem", verdict(made.asked, device)
    yield "a pass", step_time(made.asked)
    if made.overrides:
        yield "proposed", " ".join(made.overrides)
