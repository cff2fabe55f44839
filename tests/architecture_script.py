"""Two steps of training on each architecture, one after the other; run by test_architectures.py, once a rank."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.config.load import load_run
from orchestrator.errors import MantaError
from orchestrator.train.setup import Place
from orchestrator.train.worker import work
from tests.launch_kit import SMALL, Folder


def main(out: str, bases: dict[str, str], data: str, stage: int, more: tuple[str, ...] = ()) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=rank, world_size=ranks)
    place = Place(rank=rank, ranks=ranks, local_ranks=ranks, device=torch.device("cpu"))
    report = {}
    for name, base in bases.items():
        quantize = "none" if name.endswith("-dense") else "nf4"
        run = load_run(
            None,
            [
                *SMALL,
                f"base={base}",
                f"base.quantize={quantize}",
                f"data={data}",
                f"shard={stage}",
                "cluster.zero.persistence_threshold=10",
                "train.steps=2",
                "train.log_every=1",
                *more,
            ],
        )
        heard = Folder(Path(out, name, str(rank)))
        try:
            work(run, place, heard)
        except MantaError as error:
            report[name] = {"error": type(error).__name__, "message": str(error)}
        else:
            loaded = {key: heard.of("loaded", key)[0] for key in ("quantized_fraction", "bytes_here", "bytes_total")}
            report[name] = {"losses": heard.of("step", "loss"), "norms": heard.of("step", "grad_norm"), **loaded}
            report[name]["evals"] = [values for kind, values in heard.events if kind == "eval"]
    Path(out, f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
