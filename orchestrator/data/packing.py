"""Samples to rows, and rows to the micro-batches of one rank.

Rows are packed before they are dealt, so what is in a row does not depend on the number of ranks. Segments of a row
do not see each other: positions restart, and attention, given positions and no mask, is cut where they do.
Shapes: B rows, T tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.batch import IGNORE, Batch, Sample
from orchestrator.errors import DataError

_MULTIPLE = 8  # widths that kernels like
_WORTH = 1024
"""Tokens of padding that a pass of its own is worth."""


@dataclass(frozen=True, slots=True)
class Row:
    """Samples that stand one after the other, all of one slot."""

    slot: int
    """Slot that the row's tokens belong to."""
    samples: list[Sample]
    """Its segments in order."""
    virtual: int = 0
    """Virtual tokens before each of them, whose embeddings the slot's method gives."""
    offset: int = 0
    """Position at which each of them begins: after a prefix of keys and values."""

    @property
    def size(self) -> int:
        """Tokens, virtual ones included."""
        return sum(self.virtual + len(s.tokens) for s in self.samples)


def pack(
    samples: Mapping[int, Sequence[Sample]],
    *,
    length: int,
    packing: bool,
    leads: Mapping[int, tuple[int, int]] | None = None,
) -> list[Row]:
    """Rows of at most ``length`` tokens that hold every sample once: best fit, longest first; one each without packing.

    The same samples in the same order give the same rows. Raises ``DataError`` for a sample longer than ``length``.

    Args:
        samples: of each slot.
        length: most tokens of a row; the virtual ones of one segment come on top.
        packing: whether a row may hold several samples.
        leads: of each slot, virtual tokens before each segment, and the position at which it begins.
    """
    rows: list[Row] = []
    for slot, mine in samples.items():
        virtual, offset = leads[slot] if leads else (0, 0)
        if too_long := [s for s in mine if len(s.tokens) > length]:
            raise DataError(f"sample {too_long[0].key} has {len(too_long[0].tokens)} tokens, a row holds {length}")
        if not packing:
            rows += [Row(slot, [s], virtual, offset) for s in mine]
            continue
        room: list[tuple[int, int]] = []  # free tokens of the slot's rows and the row's index, ascending
        for sample in sorted(mine, key=lambda s: -len(s.tokens)):
            size = virtual + len(sample.tokens)
            at = bisect_left(room, (size, -1))
            if at < len(room):
                free, index = room.pop(at)
                rows[index].samples.append(sample)
            else:
                free, index = virtual + length, len(rows)
                rows.append(Row(slot, [sample], virtual, offset))
            insort(room, (free - size, index))
    return rows


def deal(rows: Sequence[Row], *, rank: int, ranks: int, rows_per_pass: int, pad_id: int) -> list[Batch]:
    """The micro-batches of one rank: together the ranks hold every row once, each has as many micro-batches.

    Rows of like size meet in one pass, over all ranks, so that little is padding and no rank waits long for another.
    A rank without a row of its own in a pass gets one of padding alone, which has no targets.
    """
    order = sorted(rows, key=lambda r: -r.size)
    passes = -(-len(order) // (ranks * rows_per_pass))
    cuts = [len(order) * p // passes for p in range(passes + 1)] if passes else []
    groups = [order[begin:end] for begin, end in pairwise(cuts)]
    return [_dealt(group, rank=rank, ranks=ranks, pad_id=pad_id) for group in groups]


def deal_by_tokens(rows: Sequence[Row], *, rank: int, ranks: int, tokens: int, pad_id: int) -> list[Batch]:
    """The same, in passes of at most ``tokens`` tokens on each rank, padding included; a longer row is one alone.

    Rows of less than half a pass's width begin a pass of their own, where that saves more than a short one costs.
    """
    groups: list[list[Row]] = []
    order = sorted(rows, key=lambda r: -r.size)
    for place, row in enumerate(order):
        group = groups[-1] if groups else []
        width = _width(group[0].size) if group else 0
        most = max(1, tokens // width) * ranks if group else 0
        left = min(most - len(group), len(order) - place)
        if len(group) >= most or (2 * row.size <= width and left * (width - row.size) > _WORTH * ranks):
            groups.append([])
        groups[-1].append(row)
    return [_dealt(group, rank=rank, ranks=ranks, pad_id=pad_id) for group in groups]


def _dealt(group: Sequence[Row], *, rank: int, ranks: int, pad_id: int) -> Batch:
    """One rank's share of a pass."""
    mine: list[Row] = []
    for turn, start in enumerate(range(0, len(group), ranks)):
        # There and back again, so that the largest rows do not all go to the first rank.
        place = start + (rank if turn % 2 == 0 else ranks - 1 - rank)
        mine += group[place : place + 1]
    return collate(mine or [Row(group[0].slot, [], group[0].virtual, group[0].offset)], pad_id=pad_id)


def collate(rows: Sequence[Row], *, pad_id: int) -> Batch:
    """One micro-batch [B, T] of rows; T is the longest row, rounded up to a multiple of 8.

    Padding is a segment of its own, with the row's slot, and no targets.
    """
    width = _width(max(r.size for r in rows))
    columns = np.empty((len(fields(Batch)), len(rows), width), dtype=np.int64)
    tokens_BT, labels_BT, slot_BT, segment_BT, position_BT, sample_BT = columns
    tokens_BT[:], labels_BT[:], sample_BT[:] = pad_id, IGNORE, -1
    made: dict[tuple[int, int, int], int] = {}
    for b, row in enumerate(rows):
        same = made.setdefault((id(row.samples), row.virtual, row.offset), b)
        columns[:, b] = columns[:, same]  # slots that read the same samples share their rows
        slot_BT[b] = row.slot
        if same != b:
            continue
        at = 0
        for number, sample in enumerate(row.samples):
            begin, at = at, at + row.virtual + len(sample.tokens)
            own = slice(begin + row.virtual, at)
            tokens_BT[b, own], labels_BT[b, own] = sample.tokens, _labels(sample)
            segment_BT[b, begin:at], sample_BT[b, begin:at] = number, sample.key
            position_BT[b, begin:at] = np.arange(row.offset, row.offset + at - begin)
        segment_BT[b, at:] = len(row.samples)
        position_BT[b, at:] = np.arange(row.offset, row.offset + width - at)
    return Batch(*torch.from_numpy(columns).unbind())


def _width(size: int) -> int:
    return max(-(-size // _MULTIPLE), 1) * _MULTIPLE


def _labels(sample: Sample) -> NDArray[np.int64]:
    """Per token the next one, where that is a target; or the sample's label, at its last token."""
    labels = np.full(len(sample.tokens), IGNORE)
    if sample.label is not None:
        labels[-1:] = sample.label
    else:
        labels[:-1] = np.where(sample.trained[1:], sample.tokens[1:], IGNORE)
    return labels
