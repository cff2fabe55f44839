"""YAML read into plain values, with the line of every key. Safe types only, no key twice, no interpolation."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

Key = tuple[str | int, ...]
"""Where a value stands: mapping keys and list indices from the top."""

_LARGEST = 100_000
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Mistake:
    """One thing wrong: at which key, where it was written (``file:line`` or the override), and what would be right."""

    key: Key
    place: str
    message: str

    def __str__(self) -> str:
        where = f" ({self.place})" if self.place else ""
        return f"{dotted(self.key)}{where}: {self.message}" if self.key else f"{self.message}{where}"


@dataclass
class Document:
    """Plain values, the place of every key among them, and what was wrong with the text."""

    value: object = None
    places: dict[Key, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """Where ``key``, or else the innermost value around it, or a part of it, was written; empty for a default."""
        for n in range(len(key), 0, -1):
            if key[:n] in self.places:
                return self.places[key[:n]]
        return next((place for part, place in self.places.items() if part[: len(key)] == key), "")


def dotted(key: Key) -> str:
    """``("data", "train", 0)`` as the user writes it: ``data.train.0``."""
    return ".".join(map(str, key))


def split(name: str) -> Key:
    """``data.train.0`` as ``("data", "train", 0)``."""
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: ``2e-4`` is a number, ``no``, ``on`` and ``2026-01-31`` are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (_TAG + "timestamp", _TAG + "bool")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_yaml(text: str, name: str) -> Document:
    """Read one YAML document called ``name``; whatever is wrong with it stands in ``mistakes``, nothing is raised."""
    document = Document()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{name}:{mark.line + 1}" if mark else name
        document.mistakes.append(Mistake((), line, f"not YAML: {error.problem or error.context}"))
        return document
    except yaml.YAMLError as error:
        document.mistakes.append(Mistake((), name, f"not YAML: {' '.join(str(error).split())}"))
        return document
    if node is not None:
        reader = _Reader(loader, name, document)
        document.value = reader.value(node, ())
    return document


class _Reader:
    """One walk over the nodes of a document."""

    def __init__(self, loader: _Loader, name: str, document: Document) -> None:
        self.loader, self.name, self.document = loader, name, document
        self.inside: set[int] = set()
        self.seen = 0

    def value(self, node: yaml.Node, key: Key) -> object:
        """The plain value of ``node``; places and mistakes go into the document."""
        self.seen += 1
        if id(node) in self.inside or self.seen > _LARGEST:
            if self.seen <= _LARGEST + 1:  # said once, not for each of a million aliases
                self.wrong(node, key, "an alias that holds itself" if id(node) in self.inside else "far too large")
            return None
        self.inside.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, key)
            if isinstance(node, yaml.SequenceNode):
                for i, item in enumerate(node.value):
                    self.document.places.setdefault((*key, i), self.line(item))
                return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
            return self.scalar(node, key)
        finally:
            self.inside.discard(id(node))

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, object]:
        """A mapping with text keys, none of them twice; ``<<`` merges below what is written out."""
        found: dict[str, object] = {}
        merged: dict[str, object] = {}
        first: dict[str, int] = {}
        for name_node, item in node.value:
            if name_node.tag == _TAG + "merge":
                for part in self.parts(item):
                    more = self.value(part, key)
                    if isinstance(more, dict):
                        merged = {**more, **merged}
                    elif more is not None:
                        self.wrong(part, key, "<< takes a mapping or a list of mappings")
                continue
            name = name_node.value if isinstance(name_node, yaml.ScalarNode) else ""
            if not name:
                self.wrong(name_node, key, "a key has to be a word")
                continue
            line = name_node.start_mark.line + 1
            if name in first:
                self.wrong(name_node, (*key, name), f"given twice; first on line {first[name]}")
                continue
            first[name] = line
            self.document.places[(*key, name)] = self.line(name_node)
            found[name] = self.value(item, (*key, name))
        return {**merged, **found}

    def parts(self, node: yaml.Node) -> Iterator[yaml.Node]:
        """The mappings that one ``<<`` names."""
        yield from node.value if isinstance(node, yaml.SequenceNode) else [node]

    def scalar(self, node: yaml.Node, key: Key) -> object:
        """Text, number, true, false or null."""
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
            self.wrong(node, key, str(problem))
            return None

    def line(self, node: yaml.Node) -> str:
        """``file:line`` of a node."""
        return f"{self.name}:{node.start_mark.line + 1}"

    def wrong(self, node: yaml.Node, key: Key, message: str) -> None:
        """Note a mistake at a node."""
        self.document.mistakes.append(Mistake(key, self.line(node), message))
