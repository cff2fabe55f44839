"""Fill a slot: the method's start values, a checkpoint's, or those of a delta to go on from."""

from collections.abc import Callable
from typing import Any

import torch

from orchestrator.config import Lora, Method, Run, Task
from orchestrator.data import Prepared
from orchestrator.delta import Delta
from orchestrator.errors import MethodError
from orchestrator.methods import Bank, from_files, method_of
from orchestrator.train.checkpoint import Restored
from orchestrator.train.fisher import first_loss, fisher
from orchestrator.train.setup import Ground
from orchestrator.train.task import knobs_of

Measure = Callable[[list[str], int], dict[str, torch.Tensor]]
"""How much each weight of some sites matters to so many training samples."""


def fill_slot(
    bank: Bank,
    slot: int,
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
        bank.add(slot, run.method, seed=run.train.seed, task=task, importance=importance)
        return bank.knobs(slot)
    knobs = knobs_of(delta)
    if not restored:
        knobs = _same_size(run.method, knobs)
    tensors = from_files(knobs, task, delta.tensors, bank.scope)
    bank.add(slot, knobs, seed=run.train.seed, tensors=tensors, task=task)
    return bank.knobs(slot)


def importance_of(ground: Ground, run: Run, data: Prepared, slot: int) -> Measure:
    """The Fisher information of a run's own data; every rank must call it. The slot is empty, before and after."""

    def measure(sites: list[str], count: int) -> dict[str, torch.Tensor]:
        start = first_loss(
            ground.bank, ground.model, run.method, data.task, seed=run.train.seed, encoder=ground.encoder, slot=slot
        )
        with start as loss:
            base, scope = ground.base.model, ground.bank.scope
            return fisher(base, ground.engine, loss, data.train, sites=sites, scope=scope, count=count)

    return measure


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
