"""Keeps credentials out of messages, manifests, parameters and tags."""

import re
from typing import Any

_USERINFO = re.compile(r"(://)[^/\s'\"]*@")
_QUERY = re.compile(r"(?i)\b((?:password|passwd|pwd|secret|token|api_?key|access_?key)=)[^&\s'\"]+")
_KEY = re.compile(r"(?i)(^|[._-])(password|passwd|secret|token|api_?key|access_?key|credentials?)$")


def redact(text: str) -> str:
    """The text with ``user:password@`` of URIs and ``token=`` values masked."""
    return _QUERY.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


def redacted(value: Any, key: str = "") -> Any:
    """A copy of nested JSON-like data with every credential in it masked, by value and by key."""
    if isinstance(value, dict):
        return {k: redacted(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(v, key) for v in value]
    if isinstance(value, str):
        return "***" if value and _KEY.search(key) else redact(value)
    return value
