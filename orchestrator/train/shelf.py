"""The samples of a pack's trials: what reads the same records shares their tokens, and one step's samples."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.config import Run
from orchestrator.data import Prepared, Sample, SampleSource
from orchestrator.data.order import Shuffled
from orchestrator.train.task import data_key, prepare_run


class Shelf:
    """See the module."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prepared: dict[str, Prepared] = {}

    def prepared(self, run: Run) -> Prepared:
        """A trial's data, at its beginning.

        Raises:
            DataError: see ``prepare``.
        """
        key = json.dumps(data_key(run))
        if key not in self._prepared:
            self._prepared[key] = prepare_run(run, self._tokenizer, None)
        found = self._prepared[key]
        if isinstance(found.train, Shuffled):
            return replace(found, train=found.train.fresh())
        return self._prepared.pop(key)  # a stream is read by one


def take(sources: Mapping[int, SampleSource], counts: Mapping[int, int]) -> dict[int, list[Sample]]:
    """The next samples of each slot; one list for all that are at the same place of the same order."""
    taken: dict[int, list[Sample]] = {}
    seen: dict[str, list[Sample]] = {}
    for slot, source in sources.items():
        if not isinstance(source, Shuffled):
            taken[slot] = source.take(counts[slot])
            continue
        key = json.dumps([source.state(), counts[slot], [id(store) for store in source.stores]])
        if key in seen:
            source.load_state({**source.state(), "position": source.position + counts[slot]})
        else:
            seen[key] = source.take(counts[slot])
        taken[slot] = seen[key]
    return taken
