"""Where a worker of Ray Train is. Brings in torch: to be imported by the worker itself."""

import os

import ray.train
import torch
from ray.train.torch import get_device

from orchestrator.train.setup import Place


def place_of(threads: int) -> Place:
    """This worker's rank and device.

    Args:
        threads: torch's, of one operation; 0 leaves them as they are.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads:
        torch.set_num_threads(threads)
    context = ray.train.get_context()
    return Place(
        rank=context.get_world_rank(),
        ranks=context.get_world_size(),
        local_ranks=context.get_local_world_size(),
        device=get_device(),
    )
