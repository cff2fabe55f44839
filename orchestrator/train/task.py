"""What the task of a run asks of base and data, and what it keeps of the delta that the run goes on from."""

from typing import Any

import torch

from orchestrator.base import is_encoder
from orchestrator.base.encoder import most_positions
from orchestrator.base.load import empty_model
from orchestrator.config import Base, Classification, Method, Run, Task
from orchestrator.data import Prepared, prepare
from orchestrator.delta import Delta
from orchestrator.errors import MethodError
from orchestrator.methods import knobs_from_peft, method_of, task_from_peft


def uses_encoder(run: Run) -> bool:
    """Whether the base is loaded as a bare encoder, such as BERT; a decoder is always a causal language model."""
    return isinstance(run.task, Classification) and is_encoder(run.base)


def prepare_run(run: Run, tokenizer: Any, parent: Delta | None) -> Prepared:
    """The run's samples and its task, labels included; a classification goes on with the labels of its parent.

    Raises:
        DataError: see ``prepare``.
        MethodError: the delta to go on from has another task, or other labels.
    """
    task = run.task if parent is None else same_task(run.task, task_of(parent), named=parent.manifest is not None)
    return prepare(run.data, tokenizer, seed=run.train.seed, task=task, longest=_longest(run, parent))


def data_key(run: Run) -> list[Any]:
    """What a fresh run's samples and their order depend on (JSON)."""
    dumped = run.model_dump(mode="json", include={"data", "task"})
    return [dumped, run.train.seed, _longest(run, None)]


def _longest(run: Run, parent: Delta | None) -> int | None:
    return longest_text(run.base, run.method if parent is None else knobs_of(parent)) if uses_encoder(run) else None


def longest_text(base: Base, knobs: Method) -> int | None:
    """Most tokens of a text that an encoder takes beside what a method puts before it; None where it has no bound."""
    most = most_positions(empty_model(base, torch.float32, encoder=True))
    method = method_of(knobs)
    return None if most is None else most - method.virtual_tokens(knobs) - method.prefix_length(knobs)


def knobs_of(delta: Delta) -> Method:
    """A delta's method and size."""
    knobs: Method = delta.manifest.method if delta.manifest else knobs_from_peft(delta.peft_config)
    return knobs


def task_of(delta: Delta) -> Task:
    """A delta's task."""
    return delta.manifest.task if delta.manifest else task_from_peft(delta.peft_config, delta.tensors)


def same_task(asked: Task, found: Task, *, named: bool) -> Task:
    """The delta's own task, with the run's dropout; a run that asks for another one is told.

    Args:
        asked: the run's.
        found: the delta's.
        named: whether its labels have names; else the run may name them, in their order.
    """
    if type(asked) is not type(found):
        raise MethodError(f"train.init_from keeps the delta's task, {found.type}; the run asks for {asked.type}")
    if not isinstance(asked, Classification) or not isinstance(found, Classification):
        return found
    labels = asked.labels or found.labels or ()
    if len(labels) != len(found.labels or ()) or (named and labels != found.labels):
        has = ", ".join((found.labels or ())[:20]) if named else f"{len(found.labels or ())} without names"
        raise MethodError(f"train.init_from keeps the delta's labels ({has}); the run's task.labels are others")
    if asked.pooling not in ("auto", found.pooling):
        raise MethodError(
            f"train.init_from keeps the delta's pooling, {found.pooling}; the run asks for {asked.pooling}"
        )
    return found.model_copy(update={"labels": labels, "dropout": asked.dropout})
