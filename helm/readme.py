"""Write the table of values in the chart's README from the comments in its ``values.yaml``.

python helm/readme.py           rewrites helm/orchestrator/README.md
python helm/readme.py --check   says whether it is as it should be
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "orchestrator"
BEGIN, END = "<!-- values: python helm/readme.py -->", "<!-- end of values -->"
_KEY = re.compile(r"^(?P<indent> *)(?P<name>[A-Za-z][\w-]*):")
_COMMENT = re.compile(r"^ *# ?(?P<text>.*)$")


@dataclass(frozen=True)
class Entry:
    """A value with a comment above it; a section has others below."""

    path: tuple[str, ...]
    comment: str
    default: Any
    section: bool


def comments(text: str) -> dict[tuple[str, ...], str]:
    """Comment by path. A comment is the lines right above a key."""
    found: dict[tuple[str, ...], str] = {}
    path: list[tuple[int, str]] = []
    said: list[str] = []
    for line in text.splitlines():
        if comment := _COMMENT.match(line):
            said.append(comment["text"].strip())
        elif key := _KEY.match(line):
            indent = len(key["indent"])
            path = [(i, name) for i, name in path if i < indent] + [(indent, key["name"])]
            if said:
                found[tuple(name for _, name in path)] = " ".join(said)
            said = []
        else:
            said = []
    return found


def entries(text: str) -> Iterator[Entry]:
    """The values in their order; a section before what is in it."""
    found = comments(text)
    values = yaml.safe_load(text)

    def below(path: tuple[str, ...], value: Any) -> Iterator[Entry]:
        inner = isinstance(value, dict) and any(p[: len(path)] == path and len(p) > len(path) for p in found)
        if path and (path in found or inner):
            yield Entry(path, found.get(path, ""), value, inner)
        if inner:
            for key, item in value.items():
                yield from below((*path, key), item)

    yield from below((), values)


def table(text: str) -> str:
    """The values as Markdown."""
    lines: list[str] = []
    open_table = False
    for entry in entries(text):
        name = ".".join(entry.path)
        if entry.section and len(entry.path) == 1:
            lines += ["", f"### {name}", "", *([entry.comment, ""] if entry.comment else [])]
            open_table = False
            continue
        if not entry.section or entry.comment:
            if not open_table:
                lines += ["", *([] if lines else ["### At the top", ""]), "| value | default | what |", "|---|---|---|"]
                open_table = True
            default = "" if entry.section else f"`{json.dumps(entry.default)}`"
            lines.append(f"| `{name}` | {default} | {entry.comment} |".replace("|  |", "| |"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def updated(readme: str, values: str) -> str:
    """The README with the table in its place."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(values)}\n\n{END}{after}"


def main() -> None:
    """Rewrite, or with ``--check`` compare."""
    file = CHART / "README.md"
    new = updated(file.read_text(), (CHART / "values.yaml").read_text())
    if "--check" not in sys.argv[1:]:
        file.write_text(new)
    elif new != file.read_text():
        sys.exit(f"{file} is out of date: python helm/readme.py")


if __name__ == "__main__":
    main()
