"""Parameters, tags and metric names in the shape and size that MLflow takes."""

import json
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.delta import redacted

PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000

_MAX_KEY = 250
_MAX_PARAM = 6000
_MAX_TAG = 5000
_ODD = re.compile(r"[^\w\-. :/]", re.ASCII)


def clean_key(key: str) -> str:
    """A metric, parameter or tag name with other characters as ``_``, at most 250 characters."""
    parts = [part if part.strip(".") else part.replace(".", "_") for part in _ODD.sub("_", key).split("/") if part]
    return ("/".join(parts) or "_")[:_MAX_KEY].rstrip("/")


def flat_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Nested settings as ``train.lr: "0.0002"``; credentials masked, long values cut."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[clean_key(prefix)] = _cut(_text(value), _MAX_PARAM)

    walk("", redacted(dict(params)))
    return flat


def flat_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as strings; credentials masked, long values cut, empty ones left out."""
    return {
        clean_key(str(key)): _cut(_text(value), _MAX_TAG)
        for key, value in redacted(dict(tags)).items()
        if value is not None
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
