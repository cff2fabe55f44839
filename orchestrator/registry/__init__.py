"""Runs, versions, aliases and lineage on MLflow: the only place that knows it."""

from orchestrator.registry.catalogue import Registry
from orchestrator.registry.evaluations import Evaluation
from orchestrator.registry.names import CHAMPION, check_alias, check_name, parse_ref
from orchestrator.registry.tracked import TrackedRun
from orchestrator.registry.versions import Listing, Version

__all__ = [
    "CHAMPION",
    "Evaluation",
    "Listing",
    "Registry",
    "TrackedRun",
    "Version",
    "check_alias",
    "check_name",
    "parse_ref",
]
