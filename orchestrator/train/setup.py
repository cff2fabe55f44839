"""What a run and a pack set up alike: engine, tokenizer, base, bank, model, and what a look at the model finds."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch

from orchestrator.base import compute_dtype, load_base, source_identity
from orchestrator.base.load import FrozenBase, empty_model
from orchestrator.base.memory import host_memory
from orchestrator.base.model import bare, count_weights, decoder_layers, text_config
from orchestrator.config import Classification, Identity, Run
from orchestrator.data import Prepared
from orchestrator.errors import ConfigError, MethodError, OutOfMemoryError
from orchestrator.methods import Bank, Scope, method_of
from orchestrator.train.engine import Engine, least
from orchestrator.train.probe import Probe, probe, probe_classifier
from orchestrator.train.task import uses_encoder
from orchestrator.train.zero import choose_stage, held_bytes

T = TypeVar("T")
Say = Callable[[str, dict[str, Any]], None]
"""Takes the kind of an event and its values."""


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


@dataclass(frozen=True)
class Origin:
    """The base before it is loaded: what is needed to read data and to check deltas."""

    tokenizer: Any
    unquantized: frozenset[int]
    """Layers held as they are."""
    identity: Identity


@dataclass(frozen=True)
class Ground:
    """What slots are filled on."""

    engine: Engine
    origin: Origin
    base: FrozenBase
    bank: Bank
    model: Any
    """What is called; of a classification without its head."""
    classifies: bool
    encoder: bool
    """Whether the base is a bare encoder."""


def freeze_randomness(seed: int) -> None:
    """Seed every generator; what matters is seeded by name anyway."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def open_engine(run: Run, place: Place, say: Say) -> Engine:
    """Ranks and their ZeRO stage.

    Raises:
        MethodError: a target matches nothing, or the method needs more of the base than a worker holds.
        OutOfMemoryError: the base does not fit.
    """
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
    say("plan", {"stage": stage, "parameters": parameters, "bytes_per_worker": share, "ranks": place.ranks})
    return Engine(zero, stage=stage, device=place.device, dtype=dtype, rows_per_pass=run.train.rows_per_pass)


def identify(run: Run, engine: Engine, tokenizer: Any) -> Origin:
    """Who the base is, the same on every rank.

    Raises:
        TrainError: the ranks read different weights.
    """
    unquantized = method_of(run.method).unquantized(run.method, layer_count(run))
    dtype = compute_dtype(run.base, engine.device)
    identity = first_rank_first(engine, lambda: source_identity(run.base, dtype=dtype, unquantized=unquantized))
    engine.same("base", identity.source_hash)
    return Origin(tokenizer, unquantized, identity)


def load(run: Run, engine: Engine, origin: Origin) -> Ground:
    """The base as this rank holds it, and an empty bank around it."""
    device, encoder = engine.device, uses_encoder(run)
    base = load_base(
        run.base,
        device=device,
        sharder=engine.sharder,
        identity=origin.identity,
        encoder=encoder,
        unquantized=origin.unquantized,
    )
    bank = Bank(
        base.model,
        device=device,
        base_id=run.base.id,
        source=base.source,
        encode=lambda text: origin.tokenizer.encode(text, add_special_tokens=False),
        fuse=device.type == "cuda",
    )
    classifies = isinstance(run.task, Classification)
    model = engine.start(bare(base.model) if classifies else base.model)
    return Ground(engine, origin, base, bank, model, classifies, encoder)


def recompute(ground: Ground) -> None:
    """Recompute activations in the backward pass."""
    ground.model.train()
    ground.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def look(ground: Ground, run: Run, slot: int, say: Say) -> Probe:
    """What a filled slot's first short passes show; told as ``loaded``. Every rank must call it."""
    engine, model, bank = ground.engine, ground.model, ground.bank
    about = {"quantized": run.base.quantize != "none", "vocabulary": text_config(model).vocab_size}
    if ground.classifies:
        found = probe_classifier(model, bank, slot, engine.device, encoder=ground.encoder, **about)
    else:
        found = probe(model, bank, slot, engine.device, **about)
    say("loaded", {**ground.base.report.as_dict(), "stage": engine.stage, "gathered_alive": found.gathered_alive})
    if engine.device.type == "cuda" and run.base.kernels == "auto" and find_spec("liger_kernel") is None:
        text = "liger-kernel is not installed (extra `gpu`): norms and activations are not fused, steps take longer"
        say("warning", {"text": text})
    if run.data.packing and not found.packs:
        say("warning", {"text": "this model lets packed sequences see each other: one sample a row instead"})
    return found


def first_rank_first(engine: Engine, do: Callable[[], T]) -> T:
    """Let the first rank fill a cache that the others then find; also where it fails, and they fail with it."""
    if engine.rank == 0:
        try:
            return do()
        finally:
            engine.barrier()
    engine.barrier()
    return do()


def total_steps(run: Run, data: Prepared) -> int:
    """Optimizer steps of the run."""
    if run.train.steps:
        return run.train.steps
    if data.train.size is None:
        raise ConfigError("a streamed set has no end: train.steps says when to stop")
    return max(1, -(-round(run.train.epochs * data.train.size) // run.train.batch_size))


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
