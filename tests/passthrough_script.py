"""A whole run on one of several ranks. Run by test_passthrough.py, once a rank; writes the losses that it saw."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.config import Run
from orchestrator.train.setup import Place
from orchestrator.train.worker import work
from tests.launch_kit import Folder


def main(out: str, run: dict[str, Any]) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=ranks)
    reporter = Folder(Path(out, f"checkpoints-{rank}"))
    work(Run.model_validate(run), Place(rank, ranks, ranks, torch.device("cpu")), reporter)
    report = {"losses": reporter.of("step", "loss"), "latest": str(reporter.latest)}
    Path(out, f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
