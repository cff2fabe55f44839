"""From the config's sources to training samples without end, held-out samples, and a report of what became of what."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config import CausalLM, Classification, Data, Source, Task, home
from orchestrator.data.batch import Sample
from orchestrator.data.counts import Report
from orchestrator.data.labels import TextEncoder, read_labels
from orchestrator.data.order import Held, Indices, SampleSource, Shuffled, Stream, Streamed
from orchestrator.data.read import open_source
from orchestrator.data.records import resolve_format
from orchestrator.data.render import Renderer
from orchestrator.data.store import Store, open_store, store_key, tokenizer_digest
from orchestrator.errors import DataError

_SPLIT = 3  # the split's own random stream; the order's use smaller numbers


@dataclass(frozen=True)
class Prepared:
    """Data, ready for training."""

    train: SampleSource
    """Training samples without end."""
    eval: Sequence[Sample] | None
    """Held-out samples, if any."""
    report: Report
    """What became of the records."""
    digest: str
    """sha256 of the training samples and their weights; of a streamed set, of its name and settings."""
    task: Task
    """What is learnt; of a classification, with its labels."""


def prepare(
    data: Data,
    tokenizer: Any,
    *,
    seed: int,
    task: Task | None = None,
    longest: int | None = None,
    cache: Path | None = None,
) -> Prepared:
    """Read, render, tokenize (once, into the cache), split and order the records.

    Args:
        data: The config.
        tokenizer: A transformers tokenizer.
        seed: Draws the order and the held-out records.
        task: What is learnt; default: next tokens. A classification without labels gets those of the training records.
        longest: Most tokens of a text to classify that the base takes.
        cache: Directory of the tokenized sets; default ``$MANTA_HOME/cache/samples``. Any number of processes share it.

    Raises:
        DataError: A source is missing, a record is bad (unless skipped), or nothing is left to train on.
    """
    if data.eval and data.eval_fraction:
        raise DataError(
            "data.eval and data.eval_fraction exclude each other: held-out sources, or a share of the training ones"
        )
    if data.streaming and data.eval_fraction:
        raise DataError(
            "data.eval_fraction needs the whole set at hand; with data.streaming give held-out sources in data.eval"
        )
    cache = cache or home() / "cache" / "samples"
    task = _with_labels(task or CausalLM(), data, cache)
    renderer = Renderer(tokenizer, data)
    if isinstance(task, Classification):
        renderer = TextEncoder(tokenizer, data, task.labels or (), longest)
    shop = _Shop(renderer, tokenizer_digest(tokenizer), cache)
    train: SampleSource
    if data.streaming:
        train, report, digest = _stream(shop, seed)
    else:
        stores, report = shop.stores(data.train)
        kept, held = _split(stores, data.eval_fraction, seed)
        train, report, digest = _mix(data, stores, kept, report, seed)
    held_out: Held | None = None
    if data.eval:
        eval_stores, report.eval = shop.stores(data.eval)
        held_out = Held(eval_stores, [np.arange(len(s), dtype=np.int64) for s in eval_stores])
    elif data.eval_fraction:
        held_out = Held(stores, held)
        tokens, trained = _counts(stores, held)
        report.eval = Report(samples=len(held_out), tokens=tokens, trained_tokens=trained, cached=report.cached)
    return Prepared(train, held_out, report, digest, task)


def _with_labels(task: Task, data: Data, cache: Path) -> Task:
    if not isinstance(task, Classification) or task.labels is not None:
        return task
    if data.streaming:
        raise DataError("a streamed set is not read through for its labels; name them in task.labels")
    readers = [(source, open_source(source)) for source in data.train]
    found = read_labels([(source, reader, reader.digest()) for source, reader in readers], cache)
    return task.model_copy(update={"labels": found})


@dataclass(frozen=True)
class _Shop:
    renderer: Renderer
    tokenizer: str
    cache: Path

    def stores(self, sources: Sequence[Source]) -> tuple[list[Store], Report]:
        stores, report = [], Report(cached=True)
        for source in sources:
            reader = open_source(source)
            store, cached = open_store(
                source, reader, self.renderer, records=reader.digest(), tokenizer=self.tokenizer, cache=self.cache
            )
            stores.append(store)
            report.add(store.report)
            report.cached &= cached
        return stores, report


def _split(stores: list[Store], fraction: float, seed: int) -> tuple[list[Indices], list[Indices]]:
    """Per source the indices to train on and those held out: its share, at least one where there are two."""
    kept, held = [], []
    for number, store in enumerate(stores):
        order = np.random.default_rng([seed, _SPLIT, number]).permutation(len(store))
        out = min(max(round(len(store) * fraction), 1), len(store) - 1) if fraction else 0
        held.append(np.sort(order[:out]))
        kept.append(np.sort(order[out:]))
    if fraction and not sum(map(len, held)):
        raise DataError("data.eval_fraction leaves nothing to hold out: there is one record")
    return kept, held


def _counts(stores: list[Store], indices: list[Indices]) -> tuple[int, int]:
    counts = [s.counts(i) for s, i in zip(stores, indices, strict=True)]
    return sum(c[0] for c in counts), sum(c[1] for c in counts)


def _mix(
    data: Data, stores: list[Store], kept: list[Indices], report: Report, seed: int
) -> tuple[Shuffled, Report, str]:
    parts = [[s.digest, len(i), hashlib.sha256(i.tobytes()).hexdigest()] for s, i in zip(stores, kept, strict=True)]
    weights = [s.weight for s in data.train]
    digest = hashlib.sha256(json.dumps([parts, weights]).encode()).hexdigest()
    mix = Shuffled(Held(stores, kept), weights, seed=seed, digest=digest)
    if data.eval_fraction:
        report.samples = mix.size
        report.tokens, report.trained_tokens = _counts(stores, kept)
    report.sources = [
        {"path": s.path, "samples": len(i), "share": n / mix.size, "passes": n / len(i)}
        for s, i, n in zip(data.train, kept, mix.quotas, strict=True)
    ]
    return mix, report, digest


def _stream(shop: _Shop, seed: int) -> tuple[Streamed, Report, str]:
    data, report, streams, keys = shop.renderer.data, Report(), [], []
    for number, source in enumerate(data.train):
        reader = open_source(source, streaming=True)
        layout = shop.renderer.layout or resolve_format(source, reader, data)
        streams.append(Stream(source, reader, shop.renderer, layout, rng=[seed, number], report=report))
        keys.append(
            [
                store_key(source, shop.renderer, records=json.dumps(reader.marks()), tokenizer=shop.tokenizer),
                source.weight,
            ]
        )
    total = sum(s.weight for s in data.train)
    report.sources = [{"path": s.path, "share": s.weight / total} for s in data.train]
    digest = hashlib.sha256(json.dumps([keys, data.shuffle_buffer]).encode()).hexdigest()
    return Streamed(streams, [s.weight for s in data.train], seed=seed, digest=digest), report, digest
