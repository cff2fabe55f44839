"""In which order samples come: endless, reshuffled each epoch, mixed by weight, resumable to the sample.

The order is a function of the seed and of how many samples were taken, so the cursor of a stored set is one number.
A streamed set is shuffled window by window: its cursor is where the window began, and how much of it is gone.
"""

import json
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import Source
from orchestrator.config.data import Format
from orchestrator.data.batch import Sample
from orchestrator.data.counts import Report
from orchestrator.data.read import Reader, Record
from orchestrator.data.records import place
from orchestrator.data.render import Renderer
from orchestrator.data.store import DROPPED, SKIPPED, TRUNCATED, Store, sample_or_reason
from orchestrator.errors import DataError

Indices = NDArray[np.int64]
_MIX, _SHUFFLE, _WINDOW = range(3)  # keep the random streams of one seed apart


class SampleSource(Protocol):
    """Training samples without end."""

    @property
    def size(self) -> int | None:
        """Samples of an epoch; None where that is not known (streaming)."""

    def take(self, n: int) -> list[Sample]:
        """The next ``n`` samples."""

    def state(self) -> dict[str, Any]:
        """The cursor (JSON): ``load_state`` of it goes on with the very next sample."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a cursor. Raises ``DataError`` where it is of other data or another seed."""


class Held(Sequence[Sample]):
    """Some samples of the stores, in a fixed order, read when asked for."""

    def __init__(self, stores: list[Store], indices: list[Indices]) -> None:
        self.stores, self.indices = stores, indices
        self._ends = np.cumsum([len(i) for i in indices])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        source = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[source - 1]) if source else 0)
        return self.stores[source].sample(int(self.indices[source][within]), index)


class Shuffled:
    """A stored mix. With one source each sample comes once per epoch.

    With several, an epoch has as many samples as all sources together, each source its share of them by weight. A
    source walks through all its samples before one comes again, whatever the epoch, so a small or heavy one repeats
    and a large or light one goes on in the next epoch.
    """

    def __init__(self, held: Held, weights: list[float], *, seed: int, digest: str) -> None:
        self._held, self._seed, self._digest = held, seed, digest
        self._starts = np.cumsum([0, *(len(i) for i in held.indices)])
        self.quotas = quotas(weights, len(held))
        """Samples of each source in an epoch."""
        self._position = 0
        self._epoch: tuple[int, list[Indices]] | None = None
        self._passes: dict[int, tuple[int, Indices]] = {}

    def fresh(self) -> "Shuffled":
        """The same order from its start, on the same stores."""
        made = copy(self)
        made._position, made._epoch, made._passes = 0, None, {}
        return made

    @property
    def stores(self) -> list[Store]:
        """Where the samples are."""
        return self._held.stores

    @property
    def position(self) -> int:
        """Samples taken."""
        return self._position

    @property
    def size(self) -> int:
        """Samples of an epoch."""
        return len(self._held)

    def __len__(self) -> int:
        return self.size

    def take(self, n: int) -> list[Sample]:
        """The next ``n`` samples."""
        taken = [self._held[self._index(i)] for i in range(self._position, self._position + n)]
        self._position += n
        return taken

    def state(self) -> dict[str, Any]:
        """The cursor."""
        return {"kind": "shuffled", "position": self._position, "seed": self._seed, "digest": self._digest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a cursor."""
        check_state(state, self.state())
        self._position = int(state["position"])

    def _index(self, position: int) -> int:
        """Which sample stands at a position of the endless order."""
        epoch, within = divmod(position, self.size)
        if self._epoch is None or self._epoch[0] != epoch:
            sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
            sources = np.random.default_rng([self._seed, _MIX, epoch]).permutation(sources)
            nth = np.empty_like(sources)  # the how manieth of its source in this epoch
            for source, quota in enumerate(self.quotas):
                nth[sources == source] = np.arange(quota)
            self._epoch = (epoch, [sources, nth])
        source, drawn = (int(column[within]) for column in self._epoch[1])
        size = len(self._held.indices[source])
        walk, step = divmod(epoch * self.quotas[source] + drawn, size)
        if source not in self._passes or self._passes[source][0] != walk:
            rng = np.random.default_rng([self._seed, _SHUFFLE, source, walk])
            self._passes[source] = (walk, rng.permutation(size).astype(np.int64))
        return int(self._starts[source] + self._passes[source][1][step])


def quotas(weights: list[float], total: int) -> list[int]:
    """``total`` split by weight, at least one each, largest remainders first."""
    shares = np.array(weights) / sum(weights) * total
    whole = np.maximum(np.floor(shares).astype(int), 1)
    for source in np.argsort(-(shares - whole), kind="stable")[: max(total - int(whole.sum()), 0)]:
        whole[source] += 1
    while whole.sum() > total and whole.max() > 1:  # the ones given to very light sources
        whole[int(whole.argmax())] -= 1
    return [int(n) for n in whole]


def check_state(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise ``DataError`` where a cursor is of another kind, seed or data set."""
    for name in ("kind", "seed", "digest"):
        if state.get(name) != own[name]:
            raise DataError(
                f"the cursor is of other data: its {name} is {state.get(name)!r}, this set's is {own[name]!r}; "
                "resume with the data and seed of the run, or start a new run"
            )


class Streamed:
    """A streamed mix: each next sample's source is drawn by weight; a source that ends begins anew.

    Every rank reads the whole stream and takes the same global batch. A bad record is met when it is read.
    """

    def __init__(self, streams: list["Stream"], weights: list[float], *, seed: int, digest: str) -> None:
        self._streams, self._seed, self._digest = streams, seed, digest
        self._bounds = np.cumsum(np.array(weights) / sum(weights))
        self._position = 0

    @property
    def size(self) -> None:
        """Not known."""
        return None

    def take(self, n: int) -> list[Sample]:
        """The next ``n`` samples."""
        taken = []
        for position in range(self._position, self._position + n):
            drawn = np.random.default_rng([self._seed, _MIX, position]).random() if len(self._streams) > 1 else 0.0
            source = min(int(np.searchsorted(self._bounds, drawn, side="right")), len(self._streams) - 1)
            sample, number = self._streams[source].next()
            taken.append(replace(sample, key=number * len(self._streams) + source))
        self._position += n
        return taken

    def state(self) -> dict[str, Any]:
        """The cursor."""
        return {
            "kind": "streamed",
            "position": self._position,
            "seed": self._seed,
            "digest": self._digest,
            "streams": [s.state() for s in self._streams],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a cursor."""
        check_state(state, {"kind": "streamed", "seed": self._seed, "digest": self._digest})
        for stream, own in zip(self._streams, state["streams"], strict=True):
            stream.load_state(own)
        self._position = int(state["position"])


class Stream:
    """One streamed source: read a window of records, give them in shuffled order, read the next."""

    def __init__(
        self, source: Source, reader: Reader, renderer: Renderer, layout: Format, *, rng: list[int], report: Report
    ) -> None:
        self._source, self._reader, self._renderer, self._layout = source, reader, renderer, layout
        self._rng, self._report = [rng[0], _WINDOW, *rng[1:]], report
        self._begin(epoch=0, read=0, start=None)

    def _begin(self, *, epoch: int, read: int, start: dict[str, Any] | None) -> None:
        """Go to where a window begins: ``read`` records of the epoch are gone, the reader's state is ``start``."""
        self._epoch, self._read, self._start = epoch, read, start
        self._records: Iterator[Record] = self._reader.records(start)
        self._window: list[tuple[Record, int]] = []
        self._used = 0
        self._fruitful = start is not None  # whether the epoch has given a sample

    def next(self) -> tuple[Sample, int]:
        """The next sample, and the number of its record in the epoch."""
        while True:
            if self._used == len(self._window):
                self._fill()
            record, number = self._window[self._used]
            self._used += 1
            outcome, sample, why = sample_or_reason(
                record.fields, record.problem, self._layout, self._source, self._renderer
            )
            where, report = place(self._reader, record), self._report
            report.records += 1
            report.skipped += outcome == SKIPPED
            report.dropped += outcome == DROPPED
            report.truncated += outcome == TRUNCATED
            if outcome == SKIPPED and self._renderer.data.on_bad_record == "fail":
                raise DataError(f"{where}: {why}")
            if sample is None:
                report.note(where, str(why))
                continue
            self._fruitful = True
            report.samples += 1
            report.tokens += len(sample.tokens)
            report.trained_tokens += sample.targets
            return sample, number

    def _fill(self) -> None:
        """Read and shuffle the next window; at the end of the set the next epoch's first."""
        if self._window:
            self._read += len(self._window)
            self._start = json.loads(json.dumps(self._reader.state()))  # a copy: readers go on writing into theirs
        self._window = self._pull()
        if not self._window:
            if not self._fruitful:
                said = "; ".join(self._report.reasons[:3])
                raise DataError(f"{self._source.path}: no record makes a sample: {said or 'there are none'}")
            self._begin(epoch=self._epoch + 1, read=0, start=None)
            self._window = self._pull()
        self._used = 0

    def _pull(self) -> list[tuple[Record, int]]:
        records: list[tuple[Record, int]] = []
        for record in self._records:
            records.append((record, self._read + len(records)))
            if len(records) == self._renderer.data.shuffle_buffer:
                break
        order = np.random.default_rng([*self._rng, self._epoch, self._read]).permutation(len(records))
        return [records[i] for i in order]

    def state(self) -> dict[str, Any]:
        """Epoch, window and place in it."""
        return {"epoch": self._epoch, "read": self._read, "start": self._start, "used": self._used}

    def load_state(self, state: dict[str, Any]) -> None:
        """Read the cursor's window again and go on in it."""
        self._begin(epoch=state["epoch"], read=state["read"], start=state["start"])
        if state["used"]:
            self._window = self._pull()
            self._used = state["used"]
            self._fruitful = True
