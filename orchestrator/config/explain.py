"""What pydantic found wrong, in words that help to mend it: what is allowed, and the nearest good value."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.config.document import Key, dotted

Node = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One wrong value: where, why, and the key or value that was probably meant (``None``: no guess)."""

    key: Key
    message: str
    unknown: bool
    guess: object = None


def nearest(word: object, good: Iterable[object]) -> object | None:
    """The member of ``good`` that reads most like ``word``, or None."""
    names = {str(g).lower(): g for g in good}
    close = get_close_matches(str(word).lower(), names, n=1, cutoff=0.55)
    return names[close[0]] if close else None


def explain(model: type[BaseModel], error: ValidationError) -> list[Finding]:
    """Each mistake that ``error`` holds, said anew from the JSON schema of ``model``."""
    schema = _Schema(model.model_json_schema())
    errors = error.errors(include_url=False)
    # A list whose members are all wrong counts as empty too; that is no mistake of its own.
    inner = {e["loc"][:n] for e in errors for n in range(len(e["loc"]))}
    found = [_finding(schema, dict(e)) for e in errors if e["type"] != "too_short" or e["loc"] not in inner]
    # Each alternative of a value complains for itself, in the same words.
    return [finding for i, finding in enumerate(found) if finding not in found[:i]]


def _finding(schema: "_Schema", error: Mapping[str, Any]) -> Finding:
    kind, given = error["type"], error.get("input")
    key, node, parent = schema.at(error["loc"])
    if kind == "extra_forbidden":
        return _unknown(schema, key, parent)
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
        said, guess = error["ctx"]["tag"], nearest(error["ctx"]["tag"], tags)
        message = f"got {shown(said)}; allowed: one of {', '.join(tags)}" + (f"; nearest: {guess}" if guess else "")
        return Finding((*key, "type"), message, unknown=False, guess=guess)
    allowed = schema.describe(node)
    if kind == "missing":
        return Finding(key, f"required: {allowed}", unknown=False)
    if kind == "value_error":
        return Finding(key, str(error["ctx"]["error"]), unknown=False)
    guess = _guess(schema.options(node), given)
    message = f"got {shown(given)}; allowed: {allowed}"
    if kind == "string_type" and isinstance(given, bool | int | float):
        message += f'; as text, write it in quotes: "{given}"'
    if guess is not None:
        message += f"; nearest: {guess}"
    return Finding(key, message, unknown=False, guess=guess)


def _unknown(schema: "_Schema", key: Key, parent: Node) -> Finding:
    siblings = [name for option in schema.options(parent) for name in option.get("properties", {})]
    guess = nearest(key[-1], siblings)
    elsewhere = [path for path in schema.leaves() if path[-1] == key[-1] and path != key]
    # A key of exactly this name in another section (`rank` for `method.rank`) is a better guess than a likeness here.
    meant = [dotted(path) for path in elsewhere[:3]] or ([dotted((*key[:-1], str(guess)))] if guess else [])
    message = "unknown key" + (f"; perhaps {' or '.join(meant)}" if meant else "")
    message += f"; allowed here: {', '.join(siblings)}" if siblings else ""
    return Finding(key, message, unknown=True, guess=None if elsewhere else guess)


def _guess(options: list[Node], given: object) -> object | None:
    """A choice that reads like ``given``, or the nearest end of the range."""
    choices = [c for option in options for c in option.get("enum", [option["const"]] if "const" in option else [])]
    if choices:
        return nearest(given, choices)
    for option in options:
        if option.get("type") in ("integer", "number") and isinstance(given, int | float):
            low: float | None = option.get("minimum")
            high: float | None = option.get("maximum")
            if low is not None and given < low:
                return low
            if high is not None and given > high:
                return high
    return None


def shown(value: object) -> str:
    """A value as it is written in a message: short, on one line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Schema:
    """A JSON schema that can be walked by keys."""

    def __init__(self, root: Node) -> None:
        self.root = root

    def options(self, node: Node) -> list[Node]:
        """The alternatives that a node allows, references resolved."""
        while "$ref" in node:
            node = self.root["$defs"][node["$ref"].rsplit("/", 1)[1]]
        either = node.get("anyOf") or node.get("oneOf")
        return [o for part in either for o in self.options(part)] if either else [node]

    def at(self, loc: Iterable[str | int]) -> tuple[Key, Node, Node]:
        """``(key, node, parent)`` at a pydantic location; union tags, which are no keys, are left out."""
        key: Key = ()
        node, parent = self.root, self.root
        for step in loc:
            options = self.options(node)
            child = next((c for o in options if (c := _child(o, step)) is not None), None)
            if child is None and len(options) > 1:
                tagged = [o for o in options if o.get("properties", {}).get("type", {}).get("const") == step]
                node = tagged[0] if tagged else node
                continue
            key, parent, node = (*key, step), node, child if child is not None else {}
        return key, node, parent

    def leaves(self, node: Node | None = None, key: Key = ()) -> Iterator[Key]:
        """Every key of the schema."""
        for option in self.options(self.root if node is None else node):
            for name, child in option.get("properties", {}).items():
                yield (*key, name)
                yield from self.leaves(child, (*key, name))
            if isinstance(items := option.get("items"), dict):
                yield from self.leaves(items, (*key, 0))

    def describe(self, node: Node) -> str:
        """What a value may be, in words."""
        return " or ".join(dict.fromkeys(self._words(option) for option in self.options(node)))

    def _words(self, option: Node) -> str:
        if "enum" in option:
            return "one of " + ", ".join(map(str, option["enum"]))
        if "const" in option:
            return str(option["const"])
        kind = option.get("type")
        if kind == "array":
            few = option.get("minItems")
            return f"list of {self.describe(option.get('items', {}))}" + (f" (at least {few})" if few else "")
        if kind == "object":
            keys = option.get("properties")
            return f"mapping with {', '.join(keys)}" if keys else "mapping"
        word = {"string": "text", "boolean": "true or false", "number": "number", "integer": "whole number"}
        bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
        parts = [f"{says} {option[name]:g}" for name, says in bounds.items() if name in option]
        text = word.get(str(kind), str(kind) if kind else "any value")
        text += f" {' and '.join(parts)}" if parts else ""
        return text + (f" matching {option['pattern']}" if "pattern" in option else "")


def _child(option: Node, step: str | int) -> Node | None:
    if isinstance(step, int):
        items = option.get("items")
        return items if isinstance(items, dict) else None
    child = option.get("properties", {}).get(step)
    if child is None and (more := option.get("additionalProperties")):
        child = more if isinstance(more, dict) else {}
    return child if isinstance(child, dict) else None
