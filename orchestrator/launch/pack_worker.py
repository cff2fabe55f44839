"""What Ray Train calls on each rank of a pack."""

import os
from typing import Any

import ray
import ray.train

from orchestrator.config import Run
from orchestrator.errors import CheckpointError, MantaError
from orchestrator.launch.trial_store import TrialStore
from orchestrator.search.lanes import SOLO


def pack_worker(config: dict[str, Any]) -> None:
    """One rank. An error that no restart mends goes to the desk: a full disk stops the search, any other one the lane."""
    desk, lane = config["desk"], config["lane"]
    if ray.get(desk.over.remote(lane)):
        return
    if ray.train.get_context().get_world_rank() == 0:
        ray.get(desk.hello.remote(config["pack"], lane))
    try:
        _work(config)
    except CheckpointError as e:
        ray.get(desk.fail.remote(type(e).__name__, str(e)))
        raise
    except MantaError as e:
        ray.get(desk.give_up.remote(lane, str(e)))
        raise


def _work(config: dict[str, Any]) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from ray.train.torch import get_device

    from orchestrator.launch.solo import train_solo
    from orchestrator.train.worker import Place

    if config["threads"]:
        torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        ranks=context.get_world_size(),
        local_ranks=context.get_local_world_size(),
        device=get_device(),
    )
    store = TrialStore(config["store"])
    train_solo(config["desk"], config["pack"], place, store, config["keep"])
