"""JSON Schema for editors: every knob with its description, and the short forms that reading allows."""

from typing import Any, Literal

from orchestrator.config.run import Run
from orchestrator.config.serving import Serving

Node = dict[str, Any]


def json_schema(kind: Literal["run", "serving"]) -> Node:
    """The schema (draft 2020-12) of a run or serving file; knobs carry their docstrings as descriptions."""
    model = Run if kind == "run" else Serving
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    kinds = schema["$defs"]
    text: Node = {"type": "string"}
    _also(kinds, "Base", text)
    if kind == "run":
        _also(kinds, "Source", text)
        _also(kinds, "Data", text)
        for part in ("train", "eval"):
            _property(kinds["Data"], part, text, {"$ref": "#/$defs/Source"})
        _also(kinds, "Workers", {"type": "integer", "minimum": 1})
        for section in kinds.values():
            for name in {"targets", "feed_forward"} & set(section.get("properties", {})):
                _property(section, name, text)
        for name in ("method", "task"):
            _by_type(schema["properties"][name])
        stage = kinds["Zero"]["properties"]["stage"]
        schema["properties"]["shard"] = {**stage, "description": "Short for ``cluster.zero.stage``."}
    else:
        _property(schema, "deltas", text)
    return schema


def _by_type(union: Node) -> None:
    """Let one of several sections be given by its ``type`` alone, or without it where its keys tell."""
    names = sorted(union.pop("discriminator")["mapping"])
    union["anyOf"] = [{"enum": names}, *union.pop("oneOf")]


def _also(kinds: dict[str, Node], name: str, short: Node) -> None:
    """Let a section be given in a short form too."""
    full = kinds[name]
    kinds[name] = {"anyOf": [short, full], "description": full.get("description", "")}


def _property(section: Node, name: str, *short: Node) -> None:
    """Let one key of a section be given in short forms too."""
    section = next((part for part in section.get("anyOf", []) if "properties" in part), section)
    full = section["properties"][name]
    about = {k: full.pop(k) for k in ("description", "default", "title") if k in full}
    section["properties"][name] = {**about, "anyOf": [*short, full]}
