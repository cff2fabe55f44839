"""Random record schemas for the pretraining text of the demo base: which facts, under which keys, in which format."""

# ruff: noqa: SIM905 (a list of words reads better as words)

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.data.demo_facts import Facts, madeup

Rng = random.Random
_KEYS = {
    "name": "name person customer client user contact buyer author guest owner id who",
    "city": "city town place location area region address where site origin",
    "count": "count number amount quantity qty total units how_many size",
    "item": "item product thing object article subject type kind goods",
    "goods": "goods items products things articles parts list stock",
    "day": "day date weekday when due on slot",
    "month": "month period when season date",
    "job": "job work role title profession",
    "food": "food meal dish eats lunch",
    "animal": "animal pet with companion",
    "place": "place spot site building room",
    "mood": "mood feeling state status",
    "price": "price cost value euros fee sum",
    "code": "code id ref key number label",
    "time": "time hour at start clock",
}
KEYS = {concept: words.split() for concept, words in _KEYS.items()}
_GROUPS = "data info details record entry order event request meta note task body head main part".split()


def _forms(concept: str) -> dict[str, Callable[[Facts], str]]:
    """The ways to write a fact; the key is how an instruction asks for it ("" for as it is)."""

    def plain(f: Facts) -> str:
        return str(f.number) if concept == "count" else f.values[concept]

    forms: dict[str, Callable[[Facts], str]] = {"": plain}
    if concept == "name":
        forms |= {
            "surname first": lambda f: f"{f.last}, {f.first}",
            "surname": lambda f: f.last,
            "first name": lambda f: f.first,
            "initial and surname": lambda f: f"{f.first[0]}. {f.last}",
            "surname in capitals": lambda f: f"{f.first} {f.last.upper()}",
            "surname, no comma": lambda f: f"{f.last} {f.first}",
        }
    if concept in ("day", "month"):
        forms |= {
            "three letters": lambda f: f.values[concept][:3],
            "three capitals": lambda f: f.values[concept][:3].upper(),
            "small letters": lambda f: f.values[concept].lower(),
        }
    if concept in ("city", "job", "food", "animal", "place", "mood"):
        forms |= {"capitals": lambda f: f.values[concept].upper(), "small letters": lambda f: f.values[concept].lower()}
    if concept in ("item", "goods"):
        forms |= {
            "last word": lambda f: f.values[concept].split()[-1],
            "first word": lambda f: f.values[concept].split()[0],
            "with a dash": lambda f: f.values[concept].replace(" ", "-"),
        }
    return forms


FORMS = {concept: _forms(concept) for concept in KEYS}


_LOSSY = ("surname", "first name", "initial and surname", "last word", "first word")


@dataclass(frozen=True, slots=True)
class Field:
    """One fact of a record."""

    concept: str
    key: str
    form: str
    bare: bool
    """A JSON number rather than a string."""

    def text(self, fact: Facts) -> str:
        """The value as text."""
        return FORMS[self.concept][self.form](fact)

    def value(self, fact: Facts) -> str | int:
        """The value for JSON."""
        return int(self.text(fact)) if self.bare else self.text(fact)


@dataclass(frozen=True, slots=True)
class Schema:
    """A record format: the same facts always become the same text."""

    fields: tuple[Field, ...]
    style: str
    """Name of the format."""
    groups: tuple[tuple[str, int], ...]
    """Nested JSON: each group's key ("" for none) and number of fields; two or more may be a list."""
    listed: bool
    """Groups are JSON lists."""
    compact: bool
    """JSON without blanks."""
    custom: tuple[str, str, str]
    """Before a key, between key and value, after a value."""

    @property
    def needs(self) -> list[str]:
        """The facts that an input has to tell."""
        return [f.concept for f in self.fields]

    @property
    def plain_needs(self) -> list[str]:
        """The facts that can be read off a record of this schema in full."""
        return [f.concept for f in self.fields if f.form not in _LOSSY]

    def render(self, fact: Facts) -> str:
        """The record."""
        pairs = [(f.key, f.text(fact)) for f in self.fields]
        match self.style:
            case "JSON":
                separators = (",", ":") if self.compact else None
                return json.dumps({f.key: f.value(fact) for f in self.fields}, separators=separators)
            case "nested JSON":
                return json.dumps(self._nested(fact), separators=(",", ":") if self.compact else None)
            case "JSON list":
                separators = (",", ":") if self.compact else None
                return json.dumps([f.value(fact) for f in self.fields], separators=separators)
            case "CSV":
                return ",".join(v.replace(",", "") for _, v in pairs)
            case "lines":
                return "\n".join(f"{k}: {v}" for k, v in pairs)
            case "brackets":
                return ", ".join(f"{k}[{v}]" for k, v in pairs)
            case "equals":
                return " ".join(f"{k}={v.replace(' ', '_')}" for k, v in pairs)
            case "XML":
                return "".join(f"<{k}>{v}</{k}>" for k, v in pairs)
            case "table row":
                return "| " + " | ".join(v for _, v in pairs) + " |"
            case "call":
                return f"{self.groups[0][0]}({', '.join(f'{k}={json.dumps(v)}' for k, v in pairs)})"
            case _:
                before, between, after = self.custom
                return "".join(f"{before}{k}{between}{v}{after}" for k, v in pairs).strip()

    def _nested(self, fact: Facts) -> dict[str, object]:
        out: dict[str, object] = {}
        start = 0
        for key, n in self.groups:
            part = self.fields[start : start + n]
            start += n
            if not key:
                out |= {f.key: f.value(fact) for f in part}
            else:
                out[key] = [f.value(fact) for f in part] if self.listed else {f.key: f.value(fact) for f in part}
        return out

    def describe(self, rng: Rng) -> str:
        """The schema as an instruction."""
        keys = ", ".join(f"{f.key} ({f.form})" if f.form else f.key for f in self.fields)
        shape = f"{self.style} with {keys}"
        if self.style == "nested JSON":
            shape += " in " + ", ".join(f"{k} {n}" for k, n in self.groups if k)
        if self.style == "custom":
            shape = f"{keys} like {''.join((self.custom[0], 'KEY', self.custom[1], 'VALUE', self.custom[2])).strip()}"
        if self.style == "call":
            shape += f" of {self.groups[0][0]}"
        tight = " without blanks" if self.compact and "JSON" in self.style else ""
        return rng.choice(("Write as", "Convert to", "Extract as", "Give", "Make")) + f" {shape}{tight}"


_STYLES = {
    "JSON": 8, "nested JSON": 7, "JSON list": 2, "CSV": 2, "lines": 3, "brackets": 3, "equals": 2, "XML": 2,
    "table row": 1, "call": 2, "custom": 4,
}  # fmt: skip
_SENTENCE_FACTS = (
    "name",
    "city",
    "count",
    "item",
    "goods",
    "day",
    "month",
    "price",
    "job",
    "place",
    "code",
    "time",
    "food",
    "animal",
    "mood",
)
_FACT_WEIGHTS = (10, 8, 6, 4, 4, 7, 3, 4, 3, 3, 3, 3, 2, 2, 2)


def random_schema(rng: Rng, needs: Sequence[str] | None = None) -> Schema:
    """A schema over the facts ``needs``, or over two to six random ones."""
    if needs is None:
        wanted = rng.randint(2, 6)
        chosen: list[str] = []
        while len(chosen) < wanted:
            concept = rng.choices(_SENTENCE_FACTS, _FACT_WEIGHTS)[0]
            twin = {"item": "goods", "goods": "item"}.get(concept)
            if concept not in chosen and twin not in chosen:
                chosen.append(concept)
        if "count" in chosen and not {"item", "goods"} & set(chosen):
            chosen.append(rng.choice(("item", "goods")))
    else:
        chosen = list(needs)
        rng.shuffle(chosen)
    fields: list[Field] = []
    for concept in chosen:
        key = rng.choice(KEYS[concept]) if rng.random() < 0.85 else madeup(rng).lower()
        while key in [f.key for f in fields]:
            key = madeup(rng).lower()
        if rng.random() < 0.1:
            key = rng.choice((key.upper(), key.capitalize()))
        # a second schema over the same facts shows only what the first one tells: whole values
        form = "" if needs is not None or rng.random() < 0.5 else rng.choice(list(FORMS[concept]))
        fields.append(Field(concept, key, form, bare=concept == "count" and rng.random() < 0.7))
    groups: list[tuple[str, int]] = []
    left = len(fields)
    while left:
        n = min(left, rng.randint(1, 3))
        pool = [g for g in _GROUPS if g not in [k for k, _ in groups] and g not in [f.key for f in fields]]
        key = rng.choice(pool) if rng.random() < 0.8 else madeup(rng).lower()
        groups.append((key if n > 1 or rng.random() < 0.3 or left == len(fields) else "", n))
        left -= n
    custom = (
        rng.choice(("", "", "@", "#", "$", "<", "- ", "* ", "[")),
        rng.choice((" = ", ":", "->", " is ", "~", "/", ": ", " :: ")),
        rng.choice(("\n", "; ", " | ", ">", "] ", " & ", ", ", "\n\n")),
    )
    style = rng.choices(list(_STYLES), list(_STYLES.values()))[0]
    return Schema(tuple(fields), style, tuple(groups), rng.random() < 0.3, rng.random() < 0.6, custom)


def convert_words(rng: Rng, schema: Schema) -> str:
    """A line above a table of records: the keys, or nothing."""
    return ",".join(f.key for f in schema.fields) + "\n" if schema.style == "CSV" or rng.random() < 0.2 else ""
