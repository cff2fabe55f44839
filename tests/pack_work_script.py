"""A whole pack on real ranks, without Ray; writes what the rank's desk heard. Run by test_pack_ranks.py."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.errors import OutOfMemoryError
from orchestrator.train import pack as pack_module
from orchestrator.train.loss import causal_lm_loss
from orchestrator.train.pack import Limits, pack
from orchestrator.train.setup import Place
from tests.launch_kit import small
from tests.pack_kit import Played


def main(
    out: str,
    shared: list[str],
    trials: dict[str, list[str]],
    at: dict[str, int] | None = None,
    until: dict[str, int] | None = None,
    full: int | None = None,
    slots: int = 8,
) -> None:
    """``full``: the second rank's memory ends at the step after so many of the pack's."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    patience = timedelta(seconds=300 if full is None else 60)  # for a rank that will not come back
    where = os.environ["RENDEZVOUS"]
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=patience)
    runs = {name: small(*shared, *own) for name, own in trials.items()}
    desk = Played(Path(out, "pack"), runs, at, until)
    failed = None
    if full is not None:
        passes = 0

        def loss(model: object, batch: object) -> object:
            nonlocal passes
            passes += torch.is_grad_enabled()
            if rank == 1 and passes > full:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return causal_lm_loss(model, batch)  # type: ignore[arg-type]

        pack_module.causal_lm_loss = loss  # type: ignore[assignment]
    try:
        place = Place(rank, ranks, ranks, torch.device("cpu"))
        pack(small(*shared), place, desk, Limits(slots=slots, tokens=512))
    except OutOfMemoryError as e:
        failed = str(e)
    report = {"heard": desk.heard, "shrunk": desk.shrunk, "failed": failed}
    Path(out, f"{rank}.json").write_text(json.dumps(report))
    if failed:
        os._exit(0)  # the other rank waits in a sum that will not be: a launcher would end it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
