"""The bank, and one small file per method."""

from orchestrator.methods.bank import Bank
from orchestrator.methods.method import Method, Scope
from orchestrator.methods.table import METHODS

__all__ = ["METHODS", "Bank", "Method", "Scope"]
