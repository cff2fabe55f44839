"""JSON Schema for editors: every knob with its description, and the short forms that reading allows."""

from typing import Any, Literal

from pydantic import BaseModel

from orchestrator.config.method import KINDS
from orchestrator.config.ranges import FORMS
from orchestrator.config.run import Run
from orchestrator.config.search import Search
from orchestrator.config.serving import Serving

Node = dict[str, Any]
Kind = Literal["run", "search", "serving"]

MODELS: dict[Kind, type[BaseModel]] = {"run": Run, "search": Search, "serving": Serving}
"""The record of each kind of file."""
_TEXT: Node = {"type": "string"}


def json_schema(kind: Kind) -> Node:
    """The schema (draft 2020-12) of a run, search or serving file; knobs carry their docstrings as descriptions."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **MODELS[kind].model_json_schema()}
    kinds = schema["$defs"]
    _also(kinds, "Base", _TEXT)
    if kind == "serving":
        _property(schema, "deltas", _TEXT)
        return schema
    _also(kinds, "Source", _TEXT)
    _also(kinds, "Data", _TEXT)
    for part in ("train", "eval"):
        _property(kinds["Data"], part, _TEXT, {"$ref": "#/$defs/Source"})
    _also(kinds, "Workers", {"type": "integer", "minimum": 1})
    stage = kinds["Zero"]["properties"]["stage"]
    schema["properties"]["shard"] = {**stage, "description": "Short for ``cluster.zero.stage``."}
    _by_type(schema["properties"]["task"])
    if kind == "run":
        _by_type(schema["properties"]["method"])
        _targets(kinds)
    else:
        _search(schema)
    return schema


def _targets(kinds: dict[str, Node]) -> None:
    """Let targets be given as one text."""
    for section in kinds.values():
        for name in {"targets", "feed_forward"} & set(section.get("properties", {})):
            _property(section, name, _TEXT)


def _search(schema: Node) -> None:
    """Short forms of a search, and its methods' knobs, each a value or a range."""
    kinds = schema["$defs"]
    for name in ("Sampler", "Scheduler"):
        _also(kinds, name, kinds[name]["properties"]["type"])
    _also(kinds, "Budget", {"type": "integer", "minimum": 1})
    _also(kinds, "Objective", kinds["Objective"]["properties"]["metric"])
    _property(schema, "objective", {"$ref": "#/$defs/Objective"})
    methods = {
        name: {k: v for k, v in kind.model_json_schema().items() if k != "$defs"} for name, kind in KINDS.items()
    }
    _targets(methods)
    range_: Node = {"$ref": "#/$defs/Range"}
    for method in methods.values():
        method.pop("required", None)
        for name in set(method["properties"]) - {"type"}:
            _property(method, name, range_)
        own = {"type": "number", "exclusiveMinimum": 0, "description": "Peak learning rate of this method."}
        method["properties"]["train.lr"] = own
        _property(method, "train.lr", range_)
    kinds["Range"] = {
        "description": "What a key is drawn from.",
        "type": "object",
        "properties": {form: {"type": "array", "minItems": 1, "description": about} for form, about in FORMS.items()},
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    }
    entries = [{"enum": sorted(methods)}, *({"$ref": f"#/$defs/{method['title']}"} for method in methods.values())]
    kinds |= {method["title"]: method for method in methods.values()}
    kinds["Entry"] = {"anyOf": entries, "description": "A method and its knobs."}
    schema["properties"]["methods"]["items"] = {"$ref": "#/$defs/Entry"}
    _property(schema, "methods", {"$ref": "#/$defs/Entry"})


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
