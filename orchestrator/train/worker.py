"""One rank of a run, from config to delta: a table of contents."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from orchestrator.base import compute_dtype, load_base, load_tokenizer, source_identity
from orchestrator.base.load import empty_model
from orchestrator.base.memory import host_memory
from orchestrator.base.model import bare, count_weights, decoder_layers, text_config
from orchestrator.config import Classification, Lora, Method, Run, Task
from orchestrator.data import Prepared
from orchestrator.delta import Delta, check_base, load_delta
from orchestrator.errors import ConfigError, MethodError, OutOfMemoryError
from orchestrator.methods import Bank, Scope, from_files, method_of
from orchestrator.train.checkpoint import Restored, read_checkpoint
from orchestrator.train.classify import Classifier, evaluator
from orchestrator.train.engine import Engine, least
from orchestrator.train.fisher import first_loss, fisher
from orchestrator.train.graph import Graphs
from orchestrator.train.loop import Loop
from orchestrator.train.loss import causal_lm_loss, plain_loss
from orchestrator.train.probe import probe, probe_classifier
from orchestrator.train.reporter import Reporter
from orchestrator.train.step import Evaluate, Layout, Loss, Stepper
from orchestrator.train.task import knobs_of, prepare_run, uses_encoder
from orchestrator.train.trial import Trial
from orchestrator.train.writer import DeltaWriter
from orchestrator.train.zero import choose_stage, held_bytes

T = TypeVar("T")
Measure = Callable[[list[str], int], dict[str, torch.Tensor]]
SLOT = 0


@dataclass(frozen=True)
class Place:
    """Where this rank is."""

    rank: int
    """Among all ranks."""
    ranks: int
    """World size."""
    local_ranks: int
    """Ranks on this node."""
    device: torch.device
    """Its device."""


def work(run: Run, place: Place, reporter: Reporter, *, start: Path | None = None) -> str:
    """Train one delta on this rank.

    Args:
        run: what to do.
        place: which rank this is; a process group is up where there are several.
        reporter: hears events, keeps checkpoints.
        start: a delta folder to continue from, when there is no checkpoint.

    Returns:
        Why it ended: ``finished``, ``stopped early``, or what told it to stop.
    """
    freeze_randomness(run.train.seed)
    method = method_of(run.method)  # knows what the config alone cannot
    tokenizer = load_tokenizer(run.base)
    engine = _engine(run, place, reporter)
    parent = load_delta(start) if start else None
    data = first_rank_first(engine, lambda: prepare_run(run, tokenizer, parent))
    reporter.event("data", {**data.report.as_dict(), "task": data.task.model_dump(mode="json")})
    dtype = compute_dtype(run.base, place.device)
    unquantized = method.unquantized(run.method, layer_count(run))
    identity = first_rank_first(engine, lambda: source_identity(run.base, dtype=dtype, unquantized=unquantized))
    engine.same("base", identity.source_hash)
    engine.same("data", data.digest)
    with reporter.restored() as folder:
        restored = read_checkpoint(folder, run.name) if folder else None
    for delta in (parent, restored.delta if restored else None):
        for warning in check_base(delta.manifest, identity) if delta else ():
            reporter.event("warning", {"text": warning})
    encoder = uses_encoder(run)
    base = load_base(
        run.base,
        device=place.device,
        sharder=engine.sharder,
        identity=identity,
        encoder=encoder,
        unquantized=unquantized,
    )
    bank = Bank(
        base.model,
        device=place.device,
        base_id=run.base.id,
        source=base.source,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        fuse=place.device.type == "cuda",
    )
    classifies = isinstance(data.task, Classification)
    model = engine.start(bare(base.model) if classifies else base.model)

    def measure(sites: list[str], count: int) -> dict[str, torch.Tensor]:
        with first_loss(bank, model, run.method, data.task, seed=run.train.seed, encoder=encoder) as loss:
            return fisher(base.model, engine, loss, data.train, sites=sites, scope=bank.scope, count=count)

    knobs = fill_slot(bank, run, data.task, restored, parent, measure)
    engine.broadcast(list(bank.windows(SLOT).values()), rank=0)  # singular vectors may differ between machines
    if run.train.recompute:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    look = {"quantized": run.base.quantize != "none", "vocabulary": text_config(model).vocab_size}
    if classifies:
        found = probe_classifier(model, bank, SLOT, place.device, encoder=encoder, **look)
    else:
        found = probe(model, bank, SLOT, place.device, **look)
    loaded = {**base.report.as_dict(), "stage": engine.stage, "gathered_alive": found.gathered_alive}
    reporter.event("loaded", loaded)
    if place.device.type == "cuda" and run.base.kernels == "auto" and find_spec("liger_kernel") is None:
        text = "liger-kernel is not installed (extra `gpu`): norms and activations are not fused, steps take longer"
        reporter.event("warning", {"text": text})
    packing = run.data.packing and found.packs
    if run.data.packing and not packing:
        reporter.event("warning", {"text": "this model lets packed sequences see each other: one sample a row instead"})
    train = run.train.model_copy(update={"lr": run.lr})
    loss: Loss = causal_lm_loss if found.in_head else plain_loss
    if classifies:
        loss = classifier = Classifier(bank, encoder=encoder, packed=packing)
    layout = Layout(run.data.length, run.train.rows_per_pass, packing, tokenizer.pad_token_id)
    graphs = None
    if loss is causal_lm_loss and engine.stage != 3 and not run.train.recompute and not run.method.whole_base:
        graphs = Graphs.of(model, bank, place.device, run.data.length, reporter)
    stepper = Stepper(model, bank, engine, loss, layout, graphs)
    evaluate: Evaluate = evaluator(stepper, classifier) if classifies else stepper.evaluate
    loop = Loop(
        train=train,
        stepper=stepper,
        trial=Trial(bank, engine, SLOT, train, total_steps(run, data)),
        source=data.train,
        held_out=data.eval,
        evaluate=evaluate,
        engine=engine,
        reporter=reporter,
        writer=DeltaWriter(
            run=run.model_copy(update={"task": data.task}),
            identity=base.identity,
            scope=bank.scope,
            sites=bank.sites(SLOT),
            knobs=knobs,
            task=data.task,
            parameters=sum(p.numel() for p in bank.parameters(SLOT).values()),
            data_digest=data.digest,
            parent=parent.sha256 if parent else None,
        ),
    )
    if restored:
        loop.restore(restored)
    try:
        return loop.run()
    except torch.OutOfMemoryError as e:
        raise OutOfMemoryError(
            f"out of GPU memory in step {loop.trial.step + 1}: lower train.rows_per_pass ({run.train.rows_per_pass}), "
            f"or data.length ({run.data.length}), set train.recompute=true, or shard=3"
        ) from e
    finally:
        engine.close()


def fill_slot(
    bank: Bank,
    run: Run,
    task: Task,
    restored: Restored | None,
    parent: Delta | None,
    measure: Measure | None = None,
) -> Any:
    """Start values, a checkpoint's, or another delta's; returns the knobs in force.

    ``measure`` says how much each weight of some sites matters to so many training samples.

    Raises:
        MethodError: the delta to continue from has another method or size than the run asks for.
    """
    delta = restored.delta if restored else parent
    if delta is None:
        method = method_of(run.method)
        count = method.importance_samples(run.method)
        importance = measure(list(method.sites(run.method, bank.scope)), count) if measure and count else None
        bank.add(SLOT, run.method, seed=run.train.seed, task=task, importance=importance)
        return bank.knobs(SLOT)
    knobs = knobs_of(delta)
    if not restored:
        knobs = _same_size(run.method, knobs)
    tensors = from_files(knobs, task, delta.tensors, bank.scope)
    bank.add(SLOT, knobs, seed=run.train.seed, tensors=tensors, task=task)
    return bank.knobs(SLOT)


_LEARNING = {"type", "dropout", "lr_ratio", "rechoose_every", "rechoose_share"}
"""Knobs that say how a delta learns, not what it is."""


def _same_size(asked: Method, found: Method) -> Method:
    """The delta's own knobs, with the run's own way of learning; a run that asks for another method or size is told."""
    if not asked.model_fields_set or (type(asked) is Lora and asked.model_fields_set <= {"type"}):
        return found
    if type(asked) is not type(found):
        raise MethodError(f"train.init_from keeps the delta's method, {found.type}; the run asks for {asked.type}")
    wrong = [
        f"{key}={getattr(asked, key)!r} (the delta has {getattr(found, key)!r})"
        for key in type(asked).model_fields
        if key in asked.model_fields_set - _LEARNING and not _agrees(getattr(asked, key), getattr(found, key))
    ]
    if wrong:
        raise MethodError(f"train.init_from keeps the delta's method and size; the run asks for {', '.join(wrong)}")
    return found.model_copy(update={k: getattr(asked, k) for k in _LEARNING & set(type(asked).model_fields)})


def _agrees(asked: Any, found: Any) -> bool:
    """Whether what is asked for is there; of options by name, each that is asked for."""
    if isinstance(asked, dict) and isinstance(found, dict):
        return all(key in found and _agrees(value, found[key]) for key, value in asked.items())
    if isinstance(asked, list) and isinstance(found, list):
        return sorted(asked, key=str) == sorted(found, key=str)
    return bool(asked == found)


def first_rank_first(engine: Engine, do: Callable[[], T]) -> T:
    """Let the first rank fill a cache that the others then find."""
    if engine.rank == 0:
        made = do()
        engine.barrier()
        return made
    engine.barrier()
    return do()


def total_steps(run: Run, data: Prepared) -> int:
    """Optimizer steps of the run."""
    if run.train.steps:
        return run.train.steps
    if data.train.size is None:
        raise ConfigError("a streamed set has no end: train.steps says when to stop")
    return max(1, -(-round(run.train.epochs * data.train.size) // run.train.batch_size))


def freeze_randomness(seed: int) -> None:
    """Seed every generator; what matters is seeded by name anyway."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _engine(run: Run, place: Place, reporter: Reporter) -> Engine:
    dtype = compute_dtype(run.base, place.device)
    empty = empty_model(run.base, dtype, encoder=uses_encoder(run))
    method_of(run.method).sites(run.method, Scope.of(empty, run.base.id))  # a wrong target, before all that is slow
    parameters, linears = count_weights(empty)
    held = held_bytes(run.base, parameters=parameters, linears=linears, itemsize=dtype.itemsize)
    memory, free = least(*_memory(place), device=place.device)
    zero = run.cluster.zero
    stage = choose_stage(zero, held=held, memory=memory, ranks=place.ranks)
    if stage == 3 and run.method.whole_base:
        raise MethodError(
            f"method {run.method.type} needs the whole base on each worker, and {held / 2**30:.1f} GiB do not fit "
            "there; take method: lora, which trains on a sharded or quantized base"
        )
    share = held if stage != 3 else 0 if zero.offload == "cpu" else held // place.ranks
    if share > free:
        raise OutOfMemoryError(
            f"base {run.base.id} needs {share / 2**30:.1f} GiB on each of {place.ranks} workers (stage {stage}, "
            f"{run.base.quantize}), {free / 2**30:.1f} GiB are free. Hold it in fewer bits (base.quantize=nf4), or "
            "shard it over more workers (cluster.workers, shard=3)"
        )
    reporter.event("plan", {"stage": stage, "parameters": parameters, "bytes_per_worker": share, "ranks": place.ranks})
    return Engine(zero, stage=stage, device=place.device, dtype=dtype, rows_per_pass=run.train.rows_per_pass)


def layer_count(run: Run) -> int:
    """Transformer layers of the run's base."""
    return len(decoder_layers(empty_model(run.base, torch.float32, encoder=uses_encoder(run)))[1])


def _memory(place: Place) -> tuple[int, int]:
    """Total and free bytes for this rank."""
    if place.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(place.device)
        return total, free
    total, free = host_memory()
    return total // place.local_ranks, free // place.local_ranks
