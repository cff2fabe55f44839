"""How many trials a pack trains at once, and in how large passes, where the config leaves that open."""

import logging
from dataclasses import dataclass

import ray

from orchestrator.base.empty import bytes_of
from orchestrator.config import Search
from orchestrator.errors import ConfigError, MethodError, OutOfMemoryError
from orchestrator.search.size import run_of, size_pack
from orchestrator.train.devices import find_gpu
from orchestrator.train.estimate import estimator_of
from orchestrator.train.task import uses_encoder
from orchestrator.train.zero import choose_stage

_log = logging.getLogger(__name__)

SLOTS_CPU, SLOTS_GPU = 8, 16
"""Slots of a pack on CPUs, and on a GPU of which the planner knows nothing."""


@dataclass(frozen=True)
class Size:
    """Of a pack."""

    slots: int
    """Trials at once."""
    tokens: int | None = None
    """Of a pass of one rank; None for the pack's own default."""


def size_of(search: Search, *, gpu: bool, share: float = 1.0) -> Size:
    """As the config says; else as many as the planner finds room for on the cluster's smallest GPU.

    Args:
        search: what is to be packed.
        gpu: whether packs are on GPUs.
        share: of a GPU, that one worker has.

    Raises:
        OutOfMemoryError: not one trial fits.
    """
    if search.packs.slots != "auto":
        return Size(search.packs.slots)
    if not gpu:
        return Size(SLOTS_CPU)
    try:
        return _planned(search, share)
    except (ConfigError, MethodError) as e:
        _log.warning("packs of %d slots: %s; packs.slots gives another number", SLOTS_GPU, e)
        return Size(SLOTS_GPU)
    except OutOfMemoryError as e:
        raise OutOfMemoryError(f"{e}; packs.slots=1 tries it all the same") from e


def _planned(search: Search, share: float) -> Size:
    names = [key.partition(":")[2] for key in ray.cluster_resources() if key.startswith("accelerator_type:")]
    if not names:
        raise ConfigError("the cluster does not say which GPUs it has")
    memory = round(share * min(find_gpu(name).memory for name in names))
    run, ranks = run_of(search), search.cluster.workers.min
    made = estimator_of(run, gpu=True, encoder=uses_encoder(run))
    stage = choose_stage(search.cluster.zero, held=bytes_of(made.model(frozenset())), memory=memory, ranks=ranks)
    found = size_pack(search, memory, ranks=ranks, stage=stage, estimator=made)
    return Size(found.slots, found.rows_per_pass * run.data.length)
