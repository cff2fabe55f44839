"""Tokenized once: the samples of one source on disk, under a key made of everything they depend on.

A store is a directory of flat arrays that are mapped, not read, so a set may be larger than memory. It appears in one
rename, under a lock, so that of any number of ranks and trials one tokenizes and the others wait and share.
"""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config import Source
from orchestrator.config.data import Format
from orchestrator.data.batch import Sample
from orchestrator.data.counts import SHOWN, Report
from orchestrator.data.read import Reader
from orchestrator.data.records import parse, resolve_format
from orchestrator.data.render import RULES, Renderer
from orchestrator.errors import DataError

LAYOUT = 2
"""Version of the files of a store."""
KEPT, TRUNCATED, DROPPED, SKIPPED = range(4)
"""What became of a record."""
_NO_LABEL = -1
_ARRAYS = ("tokens.i32", "trained.u8", "labels.i32")


def sample_or_reason(
    fields: dict[str, Any] | None, problem: str | None, layout: Format, source: Source, renderer: Renderer
) -> tuple[int, Sample | None, str | None]:
    """What becomes of a record, its sample, or why it has none (a malformed one is ``SKIPPED``)."""
    if fields is None:
        return SKIPPED, None, problem
    try:
        whole = renderer(parse(fields, source, renderer.data, layout))
    except DataError as error:
        return SKIPPED, None, str(error)
    length = renderer.length
    sample = renderer.cut(whole)
    if not sample.targets:
        cut = f"none of its {whole.targets} target tokens is within the first {length} of {len(whole.tokens)} tokens"
        return DROPPED, None, cut if whole.targets else "it has no target token"
    return (TRUNCATED if len(whole.tokens) > length else KEPT), sample, None


class Store:
    """The samples of one source, mapped from disk. Indices are those of the source's order."""

    def __init__(self, path: Path, names: list[str]) -> None:
        meta = json.loads((path / "meta.json").read_text())
        self.digest: str = meta["digest"]
        """sha256 over the samples."""
        self.report = Report(
            **meta["counts"], reasons=[f"{names[f]}:{line}: {why}" for f, line, why in meta["reasons"]]
        )
        self.path = path
        self._offsets = np.load(path / "offsets.npy", mmap_mode="r")
        self._tokens = np.memmap(path / "tokens.i32", dtype=np.int32, mode="r")
        self._trained = np.memmap(path / "trained.u8", dtype=np.uint8, mode="r")
        self._labels = np.memmap(path / "labels.i32", dtype=np.int32, mode="r")
        whole = len(self._tokens) == len(self._trained) == self._offsets[-1]
        if not whole or len(self._labels) != len(self):
            raise DataError(f"{path} is damaged; remove it, and the next run makes it again")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def sample(self, index: int, key: int) -> Sample:
        """One sample, under the given key."""
        at = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        label = int(self._labels[index])
        trained = self._trained[at].astype(bool).tolist()
        return Sample(self._tokens[at].tolist(), trained, key, None if label == _NO_LABEL else label)

    def counts(self, indices: "np.ndarray[Any, np.dtype[np.int64]]") -> tuple[int, int]:
        """Tokens and targets of some samples."""
        spans = [slice(int(self._offsets[i]), int(self._offsets[i + 1])) for i in indices]
        targets = sum(int(self._trained[s][1:].sum()) for s in spans) + int((self._labels[indices] != _NO_LABEL).sum())
        return sum(s.stop - s.start for s in spans), targets


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does: its pipeline, special tokens and chat template."""
    if (core := getattr(tokenizer, "backend_tokenizer", None)) is not None and hasattr(core, "to_str"):
        pipeline = json.loads(core.to_str())
        pipeline |= {"truncation": None, "padding": None}  # state of the last call, not of the tokenizer
    else:
        pipeline = [sorted(tokenizer.get_vocab().items()), repr(sorted(tokenizer.init_kwargs.items(), key=str))]
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    parts = [type(tokenizer).__name__, pipeline, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def store_key(source: Source, renderer: Renderer, *, records: str, tokenizer: str) -> str:
    """sha256 of all that the samples of a source depend on, given the digests of its records and of the tokenizer."""
    data = renderer.data
    parts = {
        "rules": [RULES, LAYOUT, version("transformers"), version("tokenizers")],
        "records": records,
        "tokenizer": tokenizer,
        "source": source.model_dump(include={"format", "columns"}),
        "data": data.model_dump(include={"length", "loss_on", "chat", "tools_key", "on_bad_record"}),
        **renderer.key,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def open_store(
    source: Source, reader: Reader, renderer: Renderer, *, records: str, tokenizer: str, cache: Path
) -> tuple[Store, bool]:
    """The samples of a source, and whether they were there already; else they are made, by one process at a time.

    Args:
        source: The source.
        reader: Its records.
        renderer: Makes samples of them.
        records: Digest of the records.
        tokenizer: Digest of the tokenizer.
        cache: Directory of the stores.
    """
    path = cache / store_key(source, renderer, records=records, tokenizer=tokenizer)
    if path.is_dir():
        return Store(path, reader.names), True
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if path.is_dir():
                return Store(path, reader.names), True
            part = cache / f".{path.name}.{uuid.uuid4().hex}"
            try:
                part.mkdir()
                _build(part, source, reader, renderer)
                part.rename(path)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if not path.is_dir():  # else another machine, which the lock does not reach, was first
            raise DataError(f"cannot write the samples of {source.path} to {cache}: {error}") from error
    return Store(path, reader.names), False


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(part: Path, source: Source, reader: Reader, renderer: Renderer) -> None:
    """Write a store to ``part``. Raises ``DataError`` at the first bad record where the policy is ``fail``."""
    from datasets import Dataset, Features, List, Value  # seconds to import; a cached set needs none of it

    data = renderer.data
    layout = renderer.layout or resolve_format(source, reader, data)
    raw = part / "records.arrow"
    _write_records(raw, reader)
    features = Features(
        {
            "file": Value("int32"),
            "line": Value("int64"),
            "tokens": List(Value("int32")),
            "trained": List(Value("uint8")),
            "label": Value("int32"),
            "outcome": Value("int8"),
            "why": Value("string"),
        }
    )
    records = Dataset.from_file(str(raw))
    done = records.map(
        _Tokenize(renderer, source, layout, reader.names),
        batched=True,
        batch_size=256,
        num_proc=data.workers if min(data.workers, len(records)) > 1 else None,
        remove_columns=["json", "problem"],
        features=features,
        cache_file_name=str(part / "samples.arrow"),
        new_fingerprint=part.name[1:17],
        desc=f"Tokenizing {source.path}",
    )
    _write_arrays(part, done, reader.names)
    del records, done
    for scratch in part.glob("*.arrow"):
        scratch.unlink()


class _Tokenize:
    """A batch of raw records to columns; a class, so that it travels to other processes."""

    def __init__(self, renderer: Renderer, source: Source, layout: Format, names: list[str]) -> None:
        self.renderer, self.source, self.layout, self.names = renderer, source, layout, names

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"tokens": [], "trained": [], "label": [], "outcome": [], "why": []}
        for file, line, text, problem in zip(*(batch[k] for k in ("file", "line", "json", "problem")), strict=True):
            fields = None if text is None else json.loads(text)
            outcome, sample, why = sample_or_reason(fields, problem, self.layout, self.source, self.renderer)
            if outcome == SKIPPED and self.renderer.data.on_bad_record == "fail":
                raise DataError(f"{self.names[file]}:{line}: {why}")
            out["tokens"].append(sample.tokens if sample else [])
            out["trained"].append(sample.trained if sample else [])
            out["label"].append(_NO_LABEL if sample is None or sample.label is None else sample.label)
            out["outcome"].append(outcome)
            out["why"].append(why)
        return out


def _write_records(path: Path, reader: Reader) -> None:
    """The records as one Arrow file of JSON texts: any shape of record fits, and processes can share it."""
    import pyarrow as pa  # type: ignore[import-untyped]

    schema = pa.schema({"file": pa.int32(), "line": pa.int64(), "json": pa.large_string(), "problem": pa.string()})
    rows: list[dict[str, Any]] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for record in reader.records():
            text = None if record.fields is None else json.dumps(record.fields, default=str)
            rows.append({"file": record.file, "line": record.line, "json": text, "problem": record.problem})
            if len(rows) == 1024:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
                rows = []
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def _write_arrays(part: Path, done: Any, names: list[str]) -> None:
    """Flat arrays and the report out of the columns, a thousand records at a time."""
    sha, lengths = hashlib.sha256(), [np.zeros(1, np.int64)]
    reasons: list[list[Any]] = []
    counts = dict.fromkeys(("records", "samples", "skipped", "dropped", "truncated", "tokens", "trained_tokens"), 0)
    with ExitStack() as stack:
        tokens, trained, labels = (stack.enter_context((part / name).open("wb")) for name in _ARRAYS)
        for table in done.with_format("arrow").iter(1000):
            outcome = table["outcome"].to_numpy()
            ids = table["tokens"].combine_chunks()
            flat = ids.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
            mask = table["trained"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.uint8)
            size = np.diff(ids.offsets.to_numpy()).astype(np.int64)
            size = size[outcome < DROPPED]
            label = table["label"].to_numpy()[outcome < DROPPED]
            flat.tofile(tokens)
            mask.tofile(trained)
            label.tofile(labels)
            for array in (size, flat, mask, label):
                sha.update(array.tobytes())
            lengths.append(size)
            first = np.cumsum(size) - size
            counts["records"] += len(outcome)
            counts["samples"] += len(size)
            counts["tokens"] += len(flat)
            counts["trained_tokens"] += int(mask.sum()) - int(mask[first].sum()) + int((label != _NO_LABEL).sum())
            for name, code in (("truncated", TRUNCATED), ("dropped", DROPPED), ("skipped", SKIPPED)):
                counts[name] += int((outcome == code).sum())
            if len(reasons) < SHOWN:
                rows = table.select(["file", "line", "why"]).to_pylist()
                reasons += [[r["file"], r["line"], r["why"]] for r in rows if r["why"]][: SHOWN - len(reasons)]
    np.save(part / "offsets.npy", np.cumsum(np.concatenate(lengths)))
    if not counts["samples"]:
        said = "; ".join(f"{names[f]}:{line}: {why}" for f, line, why in reasons[:3])
        raise DataError(f"none of the {counts['records']} records makes a sample: {said or 'there are none'}")
    meta = {"digest": sha.hexdigest(), "counts": counts, "reasons": reasons}
    for name in (*_ARRAYS, "offsets.npy"):
        with (part / name).open("rb") as file:
            os.fsync(file.fileno())
    (part / "meta.json").write_text(json.dumps(meta))
