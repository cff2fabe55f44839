"""The records of an evaluation: what is asked, what would be right, and a digest of both."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from orchestrator.config import Data, Source
from orchestrator.config.openai import ChatRequest, CompletionRequest, Message
from orchestrator.data import Renderer, Sample
from orchestrator.data.read import find_files, open_source
from orchestrator.data.records import Example, parse, place, rename
from orchestrator.errors import DataError, ServeError
from orchestrator.serve.prompt import Prompter


@dataclass(frozen=True)
class Item:
    """One record."""

    place: str
    """``file:line``."""
    example: Example
    """The record, understood."""
    references: tuple[str, ...]
    """Right answers; none where the record asks nothing."""


@dataclass(frozen=True)
class EvalSet:
    """The records in their order."""

    name: str
    """What the set is called: its path, or hub name and split."""
    items: list[Item]
    """The records."""
    digest: str
    """sha256 of the records that are used, whatever file they stand in."""


def read_set(source: Source, limit: int | None = None) -> EvalSet:
    """Read a set, or its first ``limit`` records.

    Raises:
        DataError: a record is bad, or there is none; says where.
    """
    reader, total, items = open_source(source), hashlib.sha256(), []
    for record in islice(reader.records(), limit):
        where = place(reader, record)
        with _at(where):
            if record.fields is None:
                raise DataError(str(record.problem))
            fields = rename(record.fields, source.columns)
            total.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
            items.append(_item(where, fields, source))
    if not items:
        raise DataError(f"{source.path}: holds no records, so there is nothing to evaluate on")
    name = source.path if find_files(source.path) else reader.names[0]  # of a hub set with its split
    return EvalSet(name, items, total.hexdigest())


def _item(where: str, fields: dict[str, Any], source: Source) -> Item:
    given = fields.pop("references", None)
    if given is not None:
        if not isinstance(given, list) or not given or not all(isinstance(text, str) and text for text in given):
            raise DataError("references: must be a list of one or more texts")
        fields.setdefault("completion", given[0])
    example = _asked(parse(fields, Source(path=source.path), Data(), source.format))
    if given is not None and example.completion is None:
        raise DataError("has `references`, which are for records with a `prompt`")
    right = given or ([example.completion] if example.completion is not None else _said(example))
    return Item(where, example, tuple(right))


def _asked(example: Example) -> Example:
    """A conversation up to the assistant's last turn, which is what is evaluated."""
    messages = example.messages or []
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return example if last is None else replace(example, messages=messages[: last + 1])


def _said(example: Example) -> list[str]:
    text = example.messages[-1].get("content") if example.messages else None
    return [text] if text else []


def need_references(items: list[Item], names: list[str]) -> None:
    """Refuse a set that asks nothing where metrics compare answers."""
    for item in items:
        if not item.references:
            raise DataError(
                f"{item.place}: has no reference to compare an answer with ({', '.join(names)}); a record needs "
                "`prompt` and `completion` or `references`, or a conversation that ends with the assistant's text"
            )


def prompts(items: list[Item], tokenizer: Any, *, chat: bool) -> list[list[int]]:
    """What is asked, in tokens, as an endpoint renders it."""
    prompter, found = Prompter(tokenizer), []
    for item in items:
        example = item.example
        with _at(item.place):
            if example.prompt is not None and not (chat and tokenizer.chat_template):
                if not example.prompt:
                    raise DataError("prompt: is empty, and there is no chat template around it")
                found += prompter.completions(CompletionRequest(model="", prompt=example.prompt))
            else:
                try:
                    turns = [Message.model_validate(message) for message in (example.messages or [])[:-1]]
                    found.append(prompter.chat(ChatRequest(model="", messages=turns, tools=example.tools)))
                except (ServeError, ValueError) as error:
                    raise DataError(f"messages: cannot be asked as a conversation: {error}") from error
    return found


def targets(items: list[Item], tokenizer: Any, *, chat: bool, length: int) -> tuple[list[Sample], int]:
    """Each reference as what a training on it would learn, numbered by record; and how many were cut to ``length``."""
    data = Data(loss_on="last", chat="auto" if chat else "never", length=length)
    renderer, found, cut = Renderer(tokenizer, data), [], 0
    for number, item in enumerate(items):
        with _at(item.place):
            for example in [_answered(item.example, text) for text in item.references] or [item.example]:
                whole = renderer(example)
                cut += len(whole.tokens) > length
                found.append(replace(renderer.cut(whole), key=number))
    return found, cut


def _answered(example: Example, text: str) -> Example:
    last = {**example.messages[-1], "content": text} if example.messages else {}
    turns = [*example.messages[:-1], last] if example.messages else None
    return replace(example, messages=turns, completion=text if example.completion is not None else None)


@contextmanager
def _at(where: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def labelled(items: list[Item], renderer: Renderer) -> list[Sample]:
    """Texts to classify. Raises ``DataError`` for a record without a label, or with one that is not the delta's."""
    found = []
    for item in items:
        with _at(item.place):
            found.append(renderer.cut(renderer(item.example)))
    return found
