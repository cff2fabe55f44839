"""Talk to an endpoint from a terminal: one question, or a conversation."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
from rich.console import Console
from rich.markup import escape

from orchestrator.errors import ServeError

URL = "http://127.0.0.1:8000/v1"
_HELP = "/model NAME to change the model, /models to list them, /clear to start afresh, /exit to leave"


def ask(
    message: str,
    *,
    model: str | None = None,
    url: str = URL,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    console: Console | None = None,
) -> str:
    """Ask once; the answer appears while it is generated, and is returned.

    Raises:
        ServeError: the endpoint cannot be reached or refuses.
    """
    with _connect(url) as client:
        messages = [*_system(system), {"role": "user", "content": message}]
        return _answer(client, model or _first(client), messages, max_tokens, temperature, console or Console())


def converse(
    *,
    model: str | None = None,
    url: str = URL,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    console: Console | None = None,
) -> None:
    """A conversation, until end of input or ``/exit``. A refused turn is reported and taken back.

    Raises:
        ServeError: the endpoint cannot be reached at the start.
    """
    out = console or Console()
    with _connect(url) as client:
        model = model or _first(client)
        out.print(f"[bold]{escape(model)}[/] at {url}   [dim]{_HELP}[/]")
        messages: list[dict[str, str]] = _system(system)
        while (line := _read(out)) is not None:
            command, _, rest = line.partition(" ")
            if command == "/exit":
                return
            if command == "/clear":
                messages = _system(system)
            elif command == "/models":
                out.print(", ".join(escape(name) for name in _models(client)))
            elif command == "/model" and rest.strip():
                model = rest.strip()
            elif line.startswith("/"):
                out.print(f"[dim]{_HELP}[/]")
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    text = _answer(client, model, messages, max_tokens, temperature, out)
                    messages.append({"role": "assistant", "content": text})
                except ServeError as error:
                    messages.pop()
                    out.print(f"[red]{escape(str(error))}[/]")


def _read(out: Console) -> str | None:
    try:
        return out.input("[bold]> [/]" if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        out.print()
        return None


def _system(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


@contextmanager
def _connect(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", timeout=600) as client, _told(url):
        yield client


@contextmanager
def _told(url: str) -> Iterator[None]:
    """The client's errors as ours."""
    try:
        yield
    except openai.APIConnectionError as error:
        raise ServeError(f"no endpoint answers at {url}; start one with `manta serve`, or give its --url") from error
    except openai.APIError as error:
        body: Any = error.body
        said = body.get("message") if isinstance(body, dict) else None
        raise ServeError(f"{url}: {said or error.message}") from error


def _models(client: openai.OpenAI) -> list[str]:
    """Deltas in the order of the config, then the base."""
    listed = list(client.models.list())
    return [m.id for m in sorted(listed, key=lambda m: getattr(m, "parent", None) is None)]


def _first(client: openai.OpenAI) -> str:
    names = _models(client)
    if not names:
        raise ServeError(f"nothing is served at {client.base_url}")
    return names[0]


def _answer(
    client: openai.OpenAI,
    model: str,
    messages: list[dict[str, str]],
    max_tokens: int | None,
    temperature: float,
    out: Console,
) -> str:
    pieces: list[str] = []
    with _told(str(client.base_url)):
        options: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
        asked: Any = messages
        stream = client.chat.completions.create(
            model=model, messages=asked, temperature=temperature, stream=True, **options
        )
        try:
            for chunk in stream:
                text = chunk.choices[0].delta.content if chunk.choices else None
                if text:
                    pieces.append(text)
                    out.print(text, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            stream.close()
    out.print()
    return "".join(pieces)
