"""What the tests of searches share: small searches, a study read from its ledger, and who trains where."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from orchestrator.config import Run, Search
from orchestrator.config.load import load_search
from orchestrator.search.study import Row, Study
from tests.launch_kit import SMALL, Folder, train_here

COMMON = (*(s for s in SMALL if not s.startswith(("train.lr", "train.rows"))), "data.eval_fraction=0.005")


def settings(folder: Path, *more: str) -> list[str]:
    """Overrides of a search of few tokens."""
    return [
        *COMMON,
        "name=tried",
        "methods=[lora, bottleneck, bitfit]",
        "sampler=random",
        "scheduler=none",
        "budget=4",
        "train.steps=4",
        "train.eval_every=2",
        f"cluster.storage={folder}/storage",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        *more,
    ]


def searched(folder: Path, *more: str) -> Search:
    """Such a search."""
    return load_search(None, settings(folder, *more))


def board(study: Study) -> list[tuple[str, str, dict[str, object], dict[int, float], dict[str, float]]]:
    """What a leaderboard is made of: trial, state, point, every loss, and metrics; nothing that a clock says."""
    return [(r.trial, r.state, r.params, r.curves.get("loss", {}), r.metrics) for r in study.ranked()]


def alone(row: Row, folder: Path) -> Folder:
    """The trial's run, trained by itself in this process."""
    return train_here(Run.model_validate(row.run), folder)


def descendants(word: str, root: psutil.Process | None = None) -> list[psutil.Process]:
    """Processes below this one (or another) whose name Ray has set to hold ``word``."""
    found = []
    for process in (root or psutil.Process()).children(recursive=True):
        try:
            if word in "".join(process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(true: Callable[[], object], timeout_s: float = 180) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def search_id(home: Path) -> str:
    """The only search of a home."""
    (folder,) = (home / "searches").iterdir()
    return folder.name


def ended(process: "subprocess.Popen[str]", timeout_s: float = 400) -> str:
    """Wait for a command; what it said on stderr."""
    _, told = process.communicate(timeout=timeout_s)
    return told
