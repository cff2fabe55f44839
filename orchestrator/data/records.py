"""The record layouts, and what each becomes: a conversation, a prompt with its completion, plain text, a labelled one.

``auto`` reads the layout off the field names: ``messages``; ``conversations`` (ShareGPT); ``instruction`` + ``output``
(Alpaca); ``prompt`` + ``completion``; ``text`` + ``label``; ``text``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from orchestrator.config import Data, Source
from orchestrator.config.data import Format
from orchestrator.data.read import Reader, Record
from orchestrator.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
"""Roles a message may have; which of them a chat template renders is the template's affair."""
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Example:
    """A record, understood. It is ``text`` alone, ``prompt`` + ``completion``, ``messages`` alone, or the last two.

    An example with both ``messages`` and ``prompt`` can be rendered through a chat template or without one.
    """

    messages: list[dict[str, Any]] | None = None
    """Conversation in the OpenAI layout, as a chat template takes it."""
    flagged: frozenset[int] = field(default=frozenset())
    """Messages with ``train: true`` (or OpenAI's ``weight: 1``)."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools."""
    prompt: str | None = None
    """What comes before the completion, without a template."""
    completion: str | None = None
    """What is learnt."""
    text: str | None = None
    """Plain text, learnt whole."""
    labelled: tuple[str, str] | None = None
    """A text and its label, where the record has both."""


def detect(fields: dict[str, Any]) -> Format:
    """The layout of a record by its field names. Raises ``DataError`` where it is none of them."""
    for name, keys in _LAYOUTS.items():
        if all(k in fields for k in keys):
            return name
    layouts = "; ".join(" + ".join(keys) for keys in _LAYOUTS.values())
    raise DataError(f"fields {', '.join(map(str, fields))} are no known layout ({layouts}); rename them with `columns`")


def resolve_format(source: Source, reader: Reader, data: Data) -> Format:
    """The layout of a whole source: as configured, else that of its first record (that is not skipped)."""
    if source.format != "auto":
        return source.format
    problem = f"{source.path}: holds no records"
    for record in reader.records():
        problem = f"{place(reader, record)}: {record.problem}"
        if record.fields is not None:
            try:
                return detect(rename(record.fields, source.columns))
            except DataError as error:
                problem = f"{place(reader, record)}: {error}"
        if data.on_bad_record == "fail":
            break
    raise DataError(problem)


def place(reader: Reader, record: Record) -> str:
    """``file:line`` of a record."""
    return f"{reader.names[record.file]}:{record.line}"


def parse(fields: dict[str, Any], source: Source, data: Data, layout: Format = "auto") -> Example:
    """One record, understood. Raises ``DataError`` that says what is wrong with it, but not where it stands."""
    fields = rename(fields, source.columns)
    layout = detect(fields) if layout == "auto" else layout
    if missing := [k for k in _LAYOUTS[layout] if k not in fields]:
        raise DataError(
            f"has no field {missing[0]!r} (layout {layout}); it has {', '.join(map(str, fields)) or 'none'}"
        )
    return _PARSERS[layout](fields, data)


def rename(fields: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Fields under our names. Raises ``DataError`` where a column to rename is not there."""
    for ours, theirs in columns.items():
        if theirs not in fields:
            close = get_close_matches(theirs, map(str, fields), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(map(str, fields)) or 'none'}"
            raise DataError(f"has no field {theirs!r}, which `columns` renames to {ours!r}{hint}")
    kept = {k: v for k, v in fields.items() if k not in columns.values()}
    return {**kept, **{ours: fields[theirs] for ours, theirs in columns.items()}}


def _text(fields: dict[str, Any], key: str, *, empty: bool = False) -> str:
    value = fields.get(key)
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{key}: must be text, is {_kind(value)}")
    if not value and not empty:
        raise DataError(f"{key}: is empty")
    return value


def _kind(value: object) -> str:
    kinds = {
        type(None): "null",
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), type(value).__name__)


def _turn(prompt: str, completion: str, *, system: str, plain: str) -> Example:
    head = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Example(messages=head + turns, prompt=(f"{system}\n\n" if system else "") + plain, completion=completion)


def _prompt(fields: dict[str, Any], data: Data) -> Example:
    prompt = _text(fields, "prompt", empty=True)
    return _turn(prompt, _text(fields, "completion"), system=_text(fields, "system", empty=True), plain=prompt)


def _alpaca(fields: dict[str, Any], data: Data) -> Example:
    instruction, extra = _text(fields, "instruction"), _text(fields, "input", empty=True)
    plain = _ALPACA.format(
        paired=", paired with an input that provides further context" if extra else "",
        instruction=instruction,
        input=f"### Input:\n{extra}\n\n" if extra else "",
    )
    prompt = f"{instruction}\n\n{extra}" if extra else instruction
    return _turn(prompt, _text(fields, "output"), system=_text(fields, "system", empty=True), plain=plain)


def _label(fields: dict[str, Any], data: Data) -> Example:
    text, label = _text(fields, "text"), label_of(fields)
    return replace(_turn(text, label, system="", plain=f"{text}\n"), labelled=(text, label))


def label_of(fields: dict[str, Any]) -> str:
    """The label of a record that has one. Raises ``DataError``."""
    label = fields.get("label")
    if not isinstance(label, str | int) or label == "":
        raise DataError(f"label: must be text or a whole number, is {_kind(label) if label != '' else 'empty'}")
    return str(label)


def _plain(fields: dict[str, Any], data: Data) -> Example:
    return Example(text=_text(fields, "text"))


def _sharegpt(fields: dict[str, Any], data: Data) -> Example:
    turns = _list(fields["conversations"], "conversations")
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            if isinstance(turn, dict) and "role" in turn:
                return _messages({**fields, "messages": turns}, data)
            raise DataError(f"conversations[{i}]: must be an object with `from` and `value`")
        if (role := _SHAREGPT.get(turn["from"])) is None:
            raise DataError(f"conversations[{i}].from: {turn['from']!r} is unknown; one of {', '.join(_SHAREGPT)}")
        message = {"role": role, "content": turn["value"], **{k: turn[k] for k in ("train", "weight") if k in turn}}
        if turn["from"] == "function_call":
            calls = _parsed(turn["value"], f"conversations[{i}].value")
            message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        messages.append(message)
    if isinstance(system := fields.get("system"), str) and system:
        messages.insert(0, {"role": "system", "content": system})
    return _messages({**fields, "messages": messages}, data)


def _messages(fields: dict[str, Any], data: Data) -> Example:
    messages, flagged = [], set()
    for i, raw in enumerate(_list(fields["messages"], "messages")):
        message, train = _message(raw, f"messages[{i}]")
        messages.append(message)
        if train:
            flagged.add(i)
            if message["role"] != "assistant":
                raise DataError(f"messages[{i}]: only an assistant's message can be flagged, is {message['role']!r}")
    if data.loss_on != "all" and not any(m["role"] == "assistant" for m in messages):
        raise DataError("messages: none is the assistant's, so nothing is learnt")
    tools = fields.get(data.tools_key)
    tools = _parsed(tools, data.tools_key) if isinstance(tools, str) and tools else tools
    if tools and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise DataError(f"{data.tools_key}: must be a list of objects, is {_kind(tools)}")
    return Example(messages=messages, flagged=frozenset(flagged), tools=tools or None)


def _message(raw: object, where: str) -> tuple[dict[str, Any], bool]:
    """A message as a template takes it, and whether it is flagged.

    Nulls go (they are what tables put for absent keys), text parts are joined, arguments of tool calls are objects
    rather than OpenAI's JSON text, since templates write them out as JSON themselves.
    """
    if not isinstance(raw, dict):
        raise DataError(f"{where}: must be an object with `role` and `content`, is {_kind(raw)}")
    message = {k: v for k, v in raw.items() if v is not None}
    role, train, weight = message.get("role"), message.pop("train", None), message.pop("weight", None)
    if role not in ROLES:
        close = get_close_matches(str(role), ROLES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}{hint}")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}.train: must be true or false, is {_kind(train)}")
    content = message.get("content", "")
    if isinstance(content, list):
        if bad := [p for p in content if not isinstance(p, dict) or not isinstance(p.get("text"), str)]:
            kind = bad[0].get("type") if isinstance(bad[0], dict) else _kind(bad[0])
            raise DataError(f"{where}.content: only text parts can be learnt, one is {kind!r}")
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise DataError(f"{where}.content: must be text, is {_kind(content)}")
    message["content"] = content
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [_call(c, f"{where}.tool_calls[{n}]") for n, c in enumerate(_list(calls, where))]
    if role != "assistant" and "content" not in raw:
        raise DataError(f"{where}: has no content")
    if role == "assistant" and not content and not calls:
        raise DataError(f"{where}: has neither content nor tool calls")
    return message, train if isinstance(train, bool) else weight == 1


def _call(raw: object, where: str) -> dict[str, Any]:
    call = {k: v for k, v in raw.items() if v is not None} if isinstance(raw, dict) else {}
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: must be an object with `function.name` and `function.arguments`")
    function = {**function}
    if isinstance(arguments := function.get("arguments", {}), str):
        function["arguments"] = _parsed(arguments, f"{where}.function.arguments") if arguments else {}
    return (
        {**call, "type": call.get("type", "function"), "function": function}
        if "function" in call
        else {
            "type": "function",
            "function": function,
        }
    )


def _list(value: object, where: str) -> list[Any]:
    value = _parsed(value, where) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: must be a list with at least one entry, is {_kind(value) if value != [] else 'empty'}"
        )
    return value


def _parsed(value: str, where: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is text that is not JSON: {error.msg} at column {error.colno}") from error


_LAYOUTS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "label": ("text", "label"),
    "text": ("text",),
}
_PARSERS: dict[Format, Callable[[dict[str, Any], Data], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt": _prompt,
    "label": _label,
    "text": _plain,
}
