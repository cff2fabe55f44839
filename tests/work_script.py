"""A whole run on real ranks, without Ray; writes each rank's losses, and a hash of the delta it ended with."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.config import Zero
from orchestrator.delta.tensors import delta_hash
from orchestrator.train.engine import Engine
from orchestrator.train.setup import Place
from orchestrator.train.worker import work
from tests.launch_kit import Folder, small


def main(out: str, overrides: list[str]) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=ranks)
    sent = [torch.tensor([rank * 5 + 2**24 + 1], dtype=torch.int32), torch.full((1,), 0.5 - rank)]
    Engine(Zero(), stage=0, device=torch.device("cpu"), dtype=torch.float32).broadcast(sent, 0)
    reporter = Folder(Path(out, f"rank{rank}"))
    work(small(*overrides), Place(rank, ranks, ranks, torch.device("cpu")), reporter)
    assert reporter.latest is not None
    digest = delta_hash(reporter.latest / "delta" / "delta")
    report = {"sent": [t.item() for t in sent], "losses": reporter.of("step", "loss"), "digest": digest}
    Path(out, f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
