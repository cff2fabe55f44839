"""Manta: many tuned adapters on one frozen base."""

__version__ = "0.1.0"
