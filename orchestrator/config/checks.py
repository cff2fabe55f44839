"""Rules that hold between knobs. Each problem is ``(dotted key, what is wrong and what would be right)``."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from orchestrator.config.base import Base
from orchestrator.config.cluster import Cluster, Tracking
from orchestrator.config.data import Data
from orchestrator.config.run import NAME_PATTERN, Run
from orchestrator.config.serving import Serving
from orchestrator.config.task import MOST_LABELS, Classification
from orchestrator.config.train import HIGHER_IS_BETTER, Train

Problem = tuple[str, str]

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""A name that ends in one of these is a file, not a hub data set."""

_REFUSED_WITH_QUANTIZED = {
    "zero_quantized_weights": "would quantize packed 4-bit or 8-bit storage again",
    "zero_quantized_nontrainable_weights": "would quantize packed 4-bit or 8-bit storage again",
    "zero_quantized_gradients": "needs the optimizer inside DeepSpeed; the delta's gradients are summed outside it",
    "stage3_use_all_reduce_for_fetch_params": "sums packed bytes on fetching, which corrupts them",
}
_OWN_KNOBS = {
    "stage": "cluster.zero.stage",
    "stage3_param_persistence_threshold": "cluster.zero.persistence_threshold",
    "offload_param": "cluster.zero.offload",
}
_REFERENCE = re.compile(NAME_PATTERN[:-1] + r"(?::[1-9]\d*|@[a-z][a-z0-9_-]{0,62})?$")
_ALIAS = re.compile(r"^(?!latest$)(?!v\d+$)[a-z][a-z0-9_-]{0,62}$")


def problems(run: Run) -> list[Problem]:
    """What is wrong with a run although each value by itself is allowed."""
    return [
        *finite(run),
        *_base(run.base),
        *_data(run.data, run.train),
        *_train(run.data, run.train),
        *_task(run),
        *_flash(run),
        *_cluster(run.base, run.cluster),
        *_tracking(run.tracking, run.base),
        *_name(run),
        *_method(run),
    ]


def serving_problems(serving: Serving) -> list[Problem]:
    """The same for an endpoint."""
    return [
        *finite(serving),
        *_base(serving.base),
        *_deltas(serving),
        *_tracking(serving.tracking, serving.base),
    ]


def is_local(name: str) -> bool:
    """Whether ``name`` can only be a path: it ends as data files do, holds ``*`` or two ``/``, or starts like one."""
    if "://" in name:
        return False
    return name.startswith((".", "~", "/")) or name.endswith(DATA_SUFFIXES) or "*" in name or name.count("/") > 1


def _what(path: str) -> Literal["file", "folder", "nothing"]:
    try:
        here = Path(path).expanduser()
        return "folder" if here.is_dir() else "file" if here.exists() else "nothing"
    except (OSError, RuntimeError):
        return "nothing"  # a name that no file here can have, a home that is nobody's, a folder that is closed to us


def _exists(path: str) -> bool:
    if "*" not in path:
        return _what(path) != "nothing"
    try:
        # Path.glob takes relative patterns only; a glob is split at its first wild card.
        parts = Path(path).expanduser().parts
        wild = next(i for i, part in enumerate(parts) if "*" in part)
        return any(Path(*parts[:wild]).glob(str(Path(*parts[wild:]))))
    except (OSError, RuntimeError, ValueError):
        return False


def _missing(path: str) -> str:
    try:
        folder = Path(path).expanduser().parent
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    except (OSError, RuntimeError):
        return f"{path} does not exist or cannot be read"
    close = get_close_matches(Path(path).name, names, n=1)
    hint = f"; did you mean {folder / close[0]}?" if close else "" if folder.is_dir() else f"; nor does {folder}"
    return f"{path} does not exist{hint}"


def finite(value: object, key: str = "") -> Iterator[Problem]:
    """Numbers below a record that are not finite."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from finite(getattr(value, name), f"{key}.{name}" if key else name)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from finite(item, f"{key}.{i}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, f"got {value}; a finite number is needed"


def _base(base: Base) -> Iterator[Problem]:
    what = _what(base.id)
    if what == "file":
        yield "base.id", f"{base.id} is a file; a model directory or hub name is needed"
    elif what == "folder" and base.id != "demo":
        if _what(f"{base.id}/config.json") != "file":
            yield "base.id", f"{base.id} holds no config.json, so it is no model directory"
    elif is_local(base.id):
        yield "base.id", _missing(base.id)
    if base.revision and (base.id == "demo" or what == "folder"):
        yield "base.revision", f"{base.id} is local and has no revisions; leave base.revision out"
    if base.attention == "flash_attention_2" and base.precision == "fp32":
        yield "base.attention", "flash_attention_2 computes in bf16 only; take sdpa, or base.precision: bf16"


def _data(data: Data, train: Train) -> Iterator[Problem]:
    for part, sources in (("train", data.train), ("eval", data.eval)):
        for i, source in enumerate(sources):
            if is_local(source.path) and not _exists(source.path):
                yield f"data.{part}.{i}.path", _missing(source.path)
            if data.loss_on == "flagged" and source.format not in ("auto", "messages"):
                yield (
                    f"data.{part}.{i}.format",
                    f"data.loss_on: flagged reads `train: true` off messages; {source.format} records have none",
                )
    if data.eval and data.eval_fraction:
        yield "data.eval_fraction", "data.eval already names held-out records; leave out one of the two"
    if data.streaming and train.steps is None:
        yield "data.streaming", "a streamed set has no known length; give train.steps"
    if data.streaming and data.eval_fraction:
        yield "data.eval_fraction", "a streamed set cannot be split; name held-out records in data.eval"


def _task(run: Run) -> Iterator[Problem]:
    task, metric = run.task, run.train.metric
    if not isinstance(task, Classification):
        if metric in HIGHER_IS_BETTER:
            yield "train.metric", f"{metric} is of a classification; take eval_loss, or task: classification"
        return
    if metric in HIGHER_IS_BETTER and not (run.data.eval or run.data.eval_fraction):
        yield "train.metric", f"{metric} needs held-out records: give data.eval or data.eval_fraction"
    for part, sources in (("train", run.data.train), ("eval", run.data.eval)):
        for i, source in enumerate(sources):
            if source.format not in ("auto", "label"):
                yield (
                    f"data.{part}.{i}.format",
                    f"a classification reads text and label; take label, not {source.format}",
                )
            if source.path == "demo":
                yield f"data.{part}.{i}.path", "the demo task has no labels; name records with text and label"
    if (labels := task.labels) is None:
        if run.data.streaming:
            yield "task.labels", "a streamed set is not read through for its labels; name them"
        return
    if not 2 <= len(labels) <= MOST_LABELS:
        yield "task.labels", f"got {len(labels):,} labels; a head has 2 to {MOST_LABELS:,}"
    if twice := [label for label, times in Counter(labels).items() if times > 1]:
        yield "task.labels", f"named twice: {', '.join(twice[:3])}"
    if "" in labels:
        yield "task.labels", "a label is empty"


def _train(data: Data, train: Train) -> Iterator[Problem]:
    if train.early_stopping and not (data.eval or data.eval_fraction):
        yield "train.early_stopping", "needs held-out records: give data.eval or data.eval_fraction"
    if (origin := train.init_from) is not None:
        what = _what(origin)
        if what == "folder":
            if _what(f"{origin}/adapter_config.json") != "file":
                yield "train.init_from", f"{origin} holds no adapter_config.json, so it is no delta"
        elif what == "file":
            yield "train.init_from", f"{origin} is a file; the delta's directory is needed"
        elif "/" in origin or is_local(origin):
            yield "train.init_from", _missing(origin)
        elif not _REFERENCE.match(origin):
            yield "train.init_from", f"{origin!r} is neither a directory nor name, name:version or name@alias"


def _cluster(base: Base, cluster: Cluster) -> Iterator[Problem]:
    zero = cluster.zero
    if base.quantize == "int8":
        one = "int8 weights are for one worker and cannot be sharded; take base.quantize: nf4"
        if cluster.workers.max > 1:
            yield "cluster.workers", f"{cluster.workers.max} workers: {one}"
        if zero.stage == 3:
            yield "cluster.zero.stage", f"stage 3: {one}"
    if zero.offload == "cpu" and zero.stage not in ("auto", 3):
        yield "cluster.zero.offload", f"needs cluster.zero.stage 3 or auto, not {zero.stage}"
    for name, value in zero.overrides.items():
        where = f"cluster.zero.overrides.{name}"
        if name in _OWN_KNOBS:
            yield where, f"has a knob of its own: {_OWN_KNOBS[name]}"
        elif base.quantize != "none" and name in _REFUSED_WITH_QUANTIZED and value not in (False, None):
            yield where, f"{_REFUSED_WITH_QUANTIZED[name]}; take it out, or base.quantize: none"
    if cluster.storage and "://" not in cluster.storage and _what(cluster.storage) == "file":
        yield "cluster.storage", f"{cluster.storage} is a file; a folder is needed"
    if base.attention == "flash_attention_2" and cluster.gpus_per_worker == 0:
        yield "base.attention", "flash_attention_2 needs a GPU; take sdpa"


def _method(run: Run) -> Iterator[Problem]:
    if run.method.type == "full" and run.base.quantize != "none":
        yield "base.quantize", f"method full trains every weight, and {run.base.quantize} ones cannot be; take none"
    if run.method.whole_base:
        why = f"method {run.method.type} needs a dense base, whole on each worker"
        if run.base.quantize != "none":
            yield "base.quantize", f"{run.base.quantize}: {why}; take base.quantize: none, or another method"
        if run.cluster.zero.stage == 3:
            yield "cluster.zero.stage", f"stage 3: {why}; take stage auto, 0, 1 or 2, or another method"


def _name(run: Run) -> Iterator[Problem]:
    if run.name == run.base.id:
        yield "name", f"{run.name} is the base's own name; requests could not tell them apart"


def _flash(run: Run) -> Iterator[Problem]:
    # transformers finds packed sequences for flash attention in a batch of one row only.
    if run.base.attention == "flash_attention_2" and run.data.packing and run.train.rows_per_pass > 1:
        yield "base.attention", "flash_attention_2 packs one row a pass: train.rows_per_pass: 1, or data.packing: false"


def _tracking(tracking: Tracking, base: Base) -> Iterator[Problem]:
    if (name := tracking.register_as) is not None:
        if not re.match(NAME_PATTERN, name):
            yield "tracking.register_as", f"got {name!r}; a delta's name matches {NAME_PATTERN}"
        elif name == base.id:
            yield "tracking.register_as", f"{name} is the base's own name; requests could not tell them apart"
    if tracking.alias is not None and not _ALIAS.match(tracking.alias):
        yield (
            "tracking.alias",
            f"got {tracking.alias!r}; a lower-case letter, then such, digits, _ and -; neither latest nor v<number>",
        )


def _deltas(serving: Serving) -> Iterator[Problem]:
    own = serving.served_name or serving.base.id
    seen: dict[str, int] = {}
    for i, delta in enumerate(serving.deltas):
        where = f"deltas.{i}"
        if _what(delta) == "folder":
            if _what(f"{delta}/adapter_config.json") != "file":
                yield where, f"{delta} holds no adapter_config.json, so it is no delta"
        elif "/" in delta or is_local(delta):
            yield where, _missing(delta)
        elif not _REFERENCE.match(delta):
            yield where, f"{delta!r} is neither a directory nor name, name:version or name@alias"
        if delta == own:
            yield where, f"{delta} is what the bare base answers to; give served_name another value"
        if delta in seen:
            yield where, f"{delta} is already deltas.{seen[delta]}"
        seen.setdefault(delta, i)
