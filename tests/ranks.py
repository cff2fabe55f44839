"""Real ranks: processes that meet over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_ranks(script: str, ranks: int, folder: Path, **arguments: Any) -> list[dict[str, Any]]:
    """Run ``python -m script`` once a rank; each writes ``<folder>/<rank>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(ranks):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "RENDEZVOUS": f"file://{folder}/rendezvous",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29599",
        }
        command = [sys.executable, "-W", "ignore", "-m", script, json.dumps({"out": str(folder), **arguments})]
        log = (folder / f"{rank}.log").open("w")
        started.append((subprocess.Popen(command, env=env, stdout=log, stderr=log), log))
    for rank, (process, log) in enumerate(started):
        code = process.wait(timeout=300)
        log.close()
        assert code == 0, (folder / f"{rank}.log").read_text()[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
