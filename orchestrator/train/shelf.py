"""The samples of a pack's trials: what reads the same records shares their tokens, and one step's samples."""

import json
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


def take(source: SampleSource, count: int, taken: dict[str, list[Sample]]) -> list[Sample]:
    """The next samples; one list for all sources that are at the same place of the same order.

    Args:
        source: whose.
        count: how many.
        taken: of this step so far; is added to.

    Raises:
        DataError: a streamed record is bad.
    """
    if not isinstance(source, Shuffled):
        return source.take(count)
    key = json.dumps([source.state(), count, [id(store) for store in source.stores]])
    if key in taken:
        source.load_state({**source.state(), "position": source.position + count})
    else:
        taken[key] = source.take(count)
    return taken[key]
