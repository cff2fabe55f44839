"""The bank, and one small file per method."""

from orchestrator.methods.bank import Bank
from orchestrator.methods.exchange import from_files, task_from_peft, to_files
from orchestrator.methods.method import Method
from orchestrator.methods.scope import Scope
from orchestrator.methods.table import METHODS, head_parameters, knobs_from_peft, method_of, trained_parameters

__all__ = [
    "METHODS",
    "Bank",
    "Method",
    "Scope",
    "from_files",
    "head_parameters",
    "knobs_from_peft",
    "method_of",
    "task_from_peft",
    "to_files",
    "trained_parameters",
]
