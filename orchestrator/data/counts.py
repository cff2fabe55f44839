"""What became of the records: the report of a prepared data set."""

from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 20
"""Reasons that a report quotes; the rest are counted."""


@dataclass
class Report:
    """Counts over all sources. A streamed set's grow while it is read."""

    records: int = 0
    """Records found."""
    samples: int = 0
    """Samples kept."""
    skipped: int = 0
    """Malformed records left out (``on_bad_record: skip``)."""
    dropped: int = 0
    """Records without a target token, mostly since truncation left none."""
    truncated: int = 0
    """Samples cut to ``length``."""
    tokens: int = 0
    """Tokens of all samples."""
    trained_tokens: int = 0
    """Tokens that are targets."""
    reasons: list[str] = field(default_factory=list)
    """``file:line: reason`` of the first skipped and dropped records."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Per source: ``path``, ``samples``, its ``share`` of the mix, the ``passes`` over it in one epoch."""
    cached: bool = False
    """Whether all samples came out of the cache."""
    eval: "Report | None" = None
    """The held-out samples."""

    def add(self, other: "Report") -> None:
        """Sum the other's counts up in this one; its reasons follow."""
        for name in ("records", "samples", "skipped", "dropped", "truncated", "tokens", "trained_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons = [*self.reasons, *other.reasons][:SHOWN]
        self.sources = [*self.sources, *other.sources]

    def note(self, place: str, reason: str) -> None:
        """Quote a reason, while there is room."""
        if len(self.reasons) < SHOWN:
            self.reasons.append(f"{place}: {reason}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)
