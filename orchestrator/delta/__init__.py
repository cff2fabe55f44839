"""Deltas on disk: tensors, manifest, model card; saved atomically and checked before use."""

from orchestrator.delta.card import card
from orchestrator.delta.files import new_dir, read_file, write_file
from orchestrator.delta.manifest import check_base, commit, login, new_manifest, versions
from orchestrator.delta.redact import redact, redacted
from orchestrator.delta.store import CARD, CONFIG, FILES, MANIFEST, Delta, load_delta, save_delta
from orchestrator.delta.tensors import MAX_BYTES, WEIGHTS, delta_hash, parse_header, read_tensors, write_tensors

__all__ = [
    "CARD",
    "CONFIG",
    "FILES",
    "MANIFEST",
    "MAX_BYTES",
    "WEIGHTS",
    "Delta",
    "card",
    "check_base",
    "commit",
    "delta_hash",
    "load_delta",
    "login",
    "new_dir",
    "new_manifest",
    "parse_header",
    "read_file",
    "read_tensors",
    "redact",
    "redacted",
    "save_delta",
    "versions",
    "write_file",
    "write_tensors",
]
