"""Ranges in a search, such as ``{choice: [4, 8]}`` and ``{log: [1e-4, 1e-2]}``, and keys that lead into a run."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.config.explain import shown

Form = Literal["choice", "uniform", "log", "int", "log_int"]
Way = tuple[str, ...]
"""Keys from a section down to one value."""

FORMS: dict[str, str] = {
    "choice": "one of a list",
    "uniform": "a number, drawn evenly",
    "log": "a positive number, drawn evenly on a logarithmic scale",
    "int": "a whole number, both ends included",
    "log_int": "a positive whole number, drawn evenly on a logarithmic scale",
}
"""Each form and what it draws."""


@dataclass(frozen=True)
class Range:
    """What one key of a run may become: the members of a choice, or ``(low, high)``, both included."""

    form: Form
    values: tuple[Any, ...]

    @property
    def continuous(self) -> bool:
        """Whether it has no end of points."""
        return self.form in ("uniform", "log")

    @property
    def size(self) -> int | None:
        """How many points it has; None for a continuous one."""
        if self.continuous:
            return None
        return len(self.values) if self.form == "choice" else self.values[1] - self.values[0] + 1

    def nearest(self, value: Any) -> Any:
        """The point closest to ``value``; the first or lowest one where it is no number."""
        if self.form == "choice":
            if value in self.values:
                return self.values[self.values.index(value)]
            numbers = [v for v in self.values if _number(v)]
            return min(numbers, key=lambda n: abs(n - value)) if numbers and _number(value) else self.values[0]
        low, high = self.values
        held = min(max(value, low), high) if _number(value) else low
        return held if self.continuous else round(held)

    def probes(self) -> Iterator[tuple[str, Any]]:
        """Values that have to be good for the key, and what to call them; one between continuous ends is no whole
        number."""
        if self.form == "choice":
            yield from ((f"choice {shown(v)}", v) for v in self.values)
            return
        low, high = self.values
        yield f"low end {low}", low
        yield f"high end {high}", high
        if self.continuous:
            yield "between the ends", low + (high - low) * 0.3819660112501051


def is_range(value: object) -> bool:
    """Whether a value is meant as a range."""
    return isinstance(value, Mapping) and any(form in value for form in FORMS)


def wrong(value: Mapping[str, Any]) -> str | None:
    """What is wrong with a range, and what would be right."""
    if len(value) != 1:
        more = [key for key in value if key not in FORMS] or list(value)
        return f"a range is one of {', '.join(FORMS)} alone; got {', '.join(map(str, value))}: take out {more[-1]}"
    ((form, given),) = value.items()
    if not isinstance(given, list | tuple):
        return f"{form} takes a list, such as {{{form}: {_example(form)}}}; got {shown(given)}"
    if form == "choice":
        if not given:
            return "choice: [] is empty; name what may be chosen"
        twice = [v for i, v in enumerate(given) if v in given[:i]]
        return f"choice names {shown(twice[0])} twice" if twice else None
    if len(given) != 2 or not all(_number(v) for v in given):
        return f"{form} takes a low and a high number, such as {{{form}: {_example(form)}}}; got {shown(given)}"
    low, high = given
    if form in ("int", "log_int") and not all(float(v).is_integer() for v in given):
        return f"{form} takes whole numbers; got {shown(given)}"
    if form in ("log", "log_int") and low <= 0:
        return f"{form} needs a low end above 0; got {shown(low)}"
    if low >= high:
        return f"the low end {shown(low)} is not below the high end {shown(high)}; swap them, or fix the value"
    return None


def read(value: Mapping[str, Any]) -> Range:
    """A range of which nothing is ``wrong``."""
    ((form, given),) = value.items()
    whole = form in ("int", "log_int")
    return Range(form, tuple(int(v) if whole else v for v in given))  # type: ignore[arg-type]


def flat(values: Mapping[str, Any], way: Way = ()) -> Iterator[tuple[Way, Any]]:
    """Every value below a mapping, with the keys that lead to it; ranges and empty mappings are values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and not is_range(value):
            yield from flat(value, (*way, str(key)))
        else:
            yield (*way, str(key)), value


def put(values: dict[str, Any], way: Way, value: Any) -> None:
    """Set ``value`` at ``way`` below ``values``, which is changed; a step into a list is an index. Tuples become lists.

    Raises:
        LookupError: the way leads nowhere.
    """
    here: Any = values
    for step, name in enumerate(way):
        last = step == len(way) - 1
        if isinstance(here, list):
            if not name.isdecimal() or int(name) >= len(here):
                raise LookupError(f"{'.'.join(way[:step])} is a list of {len(here)}; it has no {name!r}")
            at: Any = int(name)
        elif isinstance(here, dict):
            at = name
            if not last and here.get(name) is None:
                here[name] = {}
        else:
            raise LookupError(f"{'.'.join(way[:step])} is a single value; it has no key {name!r}")
        if last:
            here[at] = value
        else:
            if isinstance(here[at], tuple):
                here[at] = list(here[at])
            here = here[at]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _example(form: str) -> str:
    return {"choice": "[a, b]", "uniform": "[0.0, 0.1]", "log": "[1e-4, 1e-2]"}.get(form, "[4, 64]")
