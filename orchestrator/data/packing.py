"""Samples to rows, and rows to the micro-batches of one rank.

Rows are packed before they are dealt, so what is in a row does not depend on the number of ranks. Segments of a row
do not see each other: positions restart, and attention, given positions and no mask, is cut where they do.
Shapes: B rows, T tokens.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.batch import IGNORE, Batch, Sample
from orchestrator.errors import DataError

_MULTIPLE = 8  # widths that kernels like


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
    batches = []
    for p in range(passes):
        group = order[len(order) * p // passes : len(order) * (p + 1) // passes]
        mine = []
        for turn, start in enumerate(range(0, len(group), ranks)):
            # There and back again, so that the largest rows do not all go to the first rank.
            place = start + (rank if turn % 2 == 0 else ranks - 1 - rank)
            mine += group[place : place + 1]
        empty = Row(group[0].slot, [], group[0].virtual, group[0].offset)
        batches.append(collate(mine or [empty], pad_id=pad_id))
    return batches


def collate(rows: Sequence[Row], *, pad_id: int) -> Batch:
    """One micro-batch [B, T] of rows; T is the longest row, rounded up to a multiple of 8.

    Padding is a segment of its own, with the row's slot, and no targets.
    """
    width = max(-(-max(r.size for r in rows) // _MULTIPLE), 1) * _MULTIPLE
    columns = np.empty((len(fields(Batch)), len(rows), width), dtype=np.int64)
    tokens_BT, labels_BT, slot_BT, segment_BT, position_BT, sample_BT = columns
    tokens_BT[:], labels_BT[:], sample_BT[:] = pad_id, IGNORE, -1
    for b, row in enumerate(rows):
        slot_BT[b] = row.slot
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


def _labels(sample: Sample) -> NDArray[np.int64]:
    """Per token the next one, where that is a target; or the sample's label, at its last token."""
    labels = np.full(len(sample.tokens), IGNORE)
    if sample.label is not None:
        labels[-1:] = sample.label
    else:
        labels[:-1] = np.where(sample.trained[1:], sample.tokens[1:], IGNORE)
    return labels
