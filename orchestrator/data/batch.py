"""What data becomes: samples, then micro-batches whose every token knows its slot, segment and position.

Shapes: B rows, T tokens.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token that is not a target."""
NO_SLOT = -1
"""Slot of a token that only the base answers."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenized record."""

    tokens: list[int]
    """Token ids."""
    trained: list[bool]
    """Per token: is it a target."""
    key: int = 0
    """Index in the data set; seeds what is random about the sample, such as dropout."""
    label: int | None = None
    """Of a text to classify: index of its label. Then no token is a target, and the sample is one."""

    @property
    def targets(self) -> int:
        """What counts in the loss: the label, or the trained tokens; the first token of a sample never does."""
        return sum(self.trained[1:]) if self.label is None else 1


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of packed rows; every field is a long tensor [B, T]. A row belongs to one slot."""

    tokens_BT: Tensor
    """Token ids."""
    labels_BT: Tensor
    """The next token of the same segment where it is a target, else ``IGNORE``: already shifted. Of a text to classify
    its label, at its last token."""
    slot_BT: Tensor
    """Slot of each token, its row's."""
    segment_BT: Tensor
    """Which sequence of the row a token belongs to, from 0."""
    position_BT: Tensor
    """Position in the segment, from 0."""
    sample_BT: Tensor
    """``Sample.key`` of each token, -1 for padding."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same on ``device``."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))
