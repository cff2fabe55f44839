"""Records to batches. Costs torch and numpy; what is heavier is imported where it is used."""

from orchestrator.data.batch import IGNORE, NO_SLOT, Batch, Sample
from orchestrator.data.counts import Report
from orchestrator.data.order import SampleSource
from orchestrator.data.packing import Row, collate, deal, deal_by_tokens, pack
from orchestrator.data.prepare import Prepared, prepare
from orchestrator.data.render import Renderer, render, truncate

__all__ = [
    "IGNORE",
    "NO_SLOT",
    "Batch",
    "Prepared",
    "Renderer",
    "Report",
    "Row",
    "Sample",
    "SampleSource",
    "collate",
    "deal",
    "deal_by_tokens",
    "pack",
    "prepare",
    "render",
    "truncate",
]
