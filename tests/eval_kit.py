"""What the tests of ``manta eval`` share: records, a base with a delta, an encoder with a classification."""

import json
from pathlib import Path
from typing import Any

from orchestrator.config.load import load_evaluation
from orchestrator.evaluate import Result, evaluate, subject_of
from orchestrator.evaluate_show import Show
from orchestrator.registry import Registry
from tests import tiny
from tests.classify_kit import RECORDS
from tests.launch_kit import small, train_here

ASKED = [
    {"prompt": "the cat", "completion": "sat on the mat"},
    {"prompt": "where did the dog run", "references": ["to the house", "the dog ran to the house again", "home"]},
    {"prompt": "again", "completion": "and again"},
]
"""Five references in all."""


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


class Made:
    """A base, a delta of it that has learnt a little, records; and the same for a classification."""

    def __init__(self, folder: Path) -> None:
        self.base, self.encoder = tiny.save(folder / "llama"), tiny.save(folder / "bert", "bert")
        self.asked, self.texts = write(folder / "asked.jsonl", ASKED), write(folder / "texts.jsonl", RECORDS)
        plain = ("base.quantize=none", "method.rank=4")
        lm = small(f"base={self.base}", *plain, f"data={self.asked_plain(folder)}", "train.steps=2", "name=talker")
        self.talker = self._train(lm, folder / "talker")
        task = (
            "task=classification",
            "train.steps=1",
            "train.lr=1e-12",
            "name=sorter",
            "train.batch_size=12",
            "train.seed=3",
        )
        reads = small(f"base={self.encoder}", *plain, f"data={self.texts}", *task)
        self.sorter = self._train(reads, folder / "sorter")

    def asked_plain(self, folder: Path) -> Path:
        return write(folder / "plain.jsonl", [r for r in ASKED if "completion" in r] * 2)

    def _train(self, run: Any, folder: Path) -> Path:
        latest = train_here(run, folder).latest
        assert latest
        return latest / run.name / "delta"


def run(ref: Path | str, data: Path, *more: str, **settings: Any) -> Result:
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    config = load_evaluation([f"delta={ref}", f"data={data}", *given, *more])
    return evaluate(config, subject_of(config.delta, Registry(config.tracking)), Show())
