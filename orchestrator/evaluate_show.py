"""What an evaluation says while it runs, and what it leaves: a table, a file of predictions."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from orchestrator.config import Base, Identity
from orchestrator.delta import write_file
from orchestrator.errors import ConfigError

T = TypeVar("T")


class Show:
    """Lines and progress bars, on the terminal's error stream."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(escape(text))

    def warn(self, text: str) -> None:
        """One line about what may matter."""
        self.console.print(f"[yellow]warning:[/yellow] {escape(text)}")

    def loading(self, base: Base, identity: Identity) -> None:
        """Say which base is loaded, and how it is held."""
        self.say(f"base      {base.id}, held as {identity.recipe}")

    def track(self, things: Sequence[T], what: str) -> Iterable[T]:
        """The things, with a progress bar on a terminal."""
        return track(things, description=what, console=self.console, disable=not self.console.is_terminal)

    def waiting(self, what: str) -> AbstractContextManager[Any]:
        """A spinner for what has no steps to count."""
        return self.console.status(escape(what))


def check_output(path: Path) -> Path:
    """Refuse a place where no file of predictions can be written."""
    path = path.expanduser().absolute()
    parent = next(folder for folder in path.parents if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--output {path}: {'is a directory' if path.is_dir() else 'cannot be written'}; name a file")
    return path


def write_predictions(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines that appear whole or not at all. Raises ``ConfigError`` where they cannot be written."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(part, "".join(_lines(records)).encode())
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _lines(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False) + "\n"
