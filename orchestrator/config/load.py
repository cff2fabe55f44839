"""A file and overrides in, a frozen ``Run``, ``Search`` or ``Serving`` out - or every mistake at once."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orchestrator.config import checks, checks_search
from orchestrator.config.document import Document, Key, Mistake, dotted, read_yaml, split
from orchestrator.config.evaluation import Evaluation
from orchestrator.config.explain import Finding, explain, nearest, shown
from orchestrator.config.run import Run
from orchestrator.config.search import Search
from orchestrator.config.serving import Serving
from orchestrator.errors import ConfigError

T = TypeVar("T", bound=BaseModel)

_SHORT: dict[Key, Key] = {("shard",): ("cluster", "zero", "stage")}
"""Short keys and what each stands for."""


def load_run(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Run:
    """Read a training run from a YAML file, or from nothing but defaults and ``key=value`` overrides.

    Raises:
        ConfigError: with every mistake in file and overrides, where each stands, and what would be right.
    """
    return _load(Run, path, overrides, checks.problems)


def load_serving(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Serving:
    """Read an endpoint's config; as ``load_run``."""
    return _load(Serving, path, overrides, checks.serving_problems)


def load_search(path: Path | str | None = None, overrides: Sequence[str] = ()) -> Search:
    """Read a search's config; as ``load_run``."""
    return _load(Search, path, overrides, checks_search.problems)


def load_evaluation(overrides: Sequence[str]) -> Evaluation:
    """An evaluation from ``key=value`` settings; as ``load_run``."""
    return _load(Evaluation, None, overrides, lambda _: [])


def make_run(values: Mapping[str, object], name: str) -> Run:
    """A run from plain values, checked as a file is; mistakes are said of ``name``.

    Raises:
        ConfigError: with every mistake.
    """
    run, findings = _check(Run, dict(values))
    mistakes = [Mistake(f.key, "", f.message) for f in findings]
    if run is not None and not findings:
        mistakes = [Mistake(split(where), "", message) for where, message in checks.problems(run)]
    if mistakes or run is None:
        raise ConfigError(_message(mistakes, name))
    return run


def apply_overrides(
    values: Mapping[str, object], overrides: Sequence[str], model: type[BaseModel] = Run
) -> dict[str, Any]:
    """``values`` with ``key=value`` overrides applied, short forms written out.

    A value is read as YAML; a key may lead through lists (``data.train.0.weight=2``; the index after the last
    appends). A mapping or list replaces what stood there; the short form of a section (``base=Qwen/Qwen3-0.6B``,
    ``data=my.jsonl``) sets what it is short for and keeps the rest of the section.

    Raises:
        ConfigError: an override that is not ``key=value`` or leads nowhere. Unknown keys are found on reading.
    """
    document = Document(copy.deepcopy(dict(values)))
    _apply(document, overrides, model)
    if document.mistakes:
        raise ConfigError(_message(document.mistakes, "the overrides"))
    assert isinstance(document.value, dict)
    return document.value


def _load(
    model: type[T], path: Path | str | None, overrides: Sequence[str], problems: Callable[[T], list[tuple[str, str]]]
) -> T:
    name = "the overrides" if path is None else str(path)
    document = Document({}) if path is None else _read(Path(path))
    if document.value is None:
        document.value = {}
    if not isinstance(document.value, dict):
        given = f"a mapping of {', '.join(model.model_fields)} is expected, not {shown(document.value)}"
        document.mistakes.append(Mistake((), str(path), given))
        document.value = {}
    for short, full in _SHORT.items():
        if short in document.places and full in document.places:
            document.mistakes.append(
                Mistake(
                    short, document.place(short), f"also given as {dotted(full)} ({document.place(full)}); keep one"
                )
            )
        elif short in document.places:
            document.places[full] = document.places[short]
    for written in [key for key in document.places if any("." in str(part) for part in key)]:
        document.places.setdefault(split(dotted(written)), document.places[written])
    _apply(document, overrides, model)
    record, findings = _check(model, document.value)
    mistakes = document.mistakes + [Mistake(f.key, document.place(f.key), f.message) for f in findings]
    if record is not None:
        wrong = [dotted(f.key) for f in findings]
        for where, message in problems(record):
            # What follows from a value that is wrong itself is no second mistake.
            if not any(w in f"{where} {message}" for w in wrong):
                key = split(where)
                mistakes.append(Mistake(key, document.place(key), message))
    if mistakes or record is None:
        raise ConfigError(_message(mistakes, name))
    return record


def _read(path: Path) -> Document:
    try:
        return read_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        guess = nearest(path.name, beside)
        hint = f"; did you mean {path.parent / str(guess)}?" if guess else ""
        raise ConfigError(f"{path} does not exist{hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; a YAML file is expected") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); a YAML file is expected") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _message(mistakes: Sequence[Mistake], name: str) -> str:
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return "\n  ".join([f"{count} in {name}:", *map(str, sorted(mistakes, key=_line))])


def _line(mistake: Mistake) -> float:
    """Line in the file; overrides come last."""
    line = mistake.place.rpartition(":")[2]
    return int(line) if line.isdecimal() else float("inf")


def _check(model: type[T], values: object) -> tuple[T | None, list[Finding]]:
    """The record and what is wrong; with mistakes, a record in which they are mended or left out, if there is one."""
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        findings = explain(model, error)
    mended = copy.deepcopy(values)
    for finding in reversed(findings):
        _mend(mended, finding)
    try:
        return model.model_validate(mended), findings
    except ValidationError as error:
        left = [f for f in explain(model, error) if len(f.key) > 1 and isinstance(f.key[-2], int)]
    for finding in reversed(left):  # a member of a list that lacks a key it needs, now that the wrong one is out
        _mend(mended, replace(finding, key=finding.key[:-1]))
    try:
        return model.model_validate(mended), findings
    except ValidationError:
        return None, findings


def _mend(values: Any, finding: Finding) -> None:
    *way, last = finding.key
    for step in way:
        inside = isinstance(values, dict) and step in values
        inside = inside or (isinstance(values, list) and isinstance(step, int) and step < len(values))
        values = values[step] if inside else None
    if isinstance(values, dict) and last in values:
        value = values.pop(last)
        if finding.guess is not None:
            values.setdefault(*((finding.guess, value) if finding.unknown else (last, finding.guess)))
    elif isinstance(values, list) and isinstance(last, int) and last < len(values):
        values.pop(last)


# ---- overrides


def _apply(document: Document, overrides: Sequence[str], model: type[BaseModel]) -> None:
    document.value = _long(document, model, document.value, ())
    for override in overrides:
        place = f"override {override!r}"
        name, equals, text = override.partition("=")
        if not equals or not all(name.strip().split(".")):
            document.mistakes.append(Mistake((), place, "an override is key=value, such as method.rank=32"))
            continue
        given = read_yaml(text, place)
        if given.mistakes:
            first = given.mistakes[0].message
            hint = "quote the value, as in key='\"...\"'"
            document.mistakes.append(Mistake((name,), place, f"{first}; to give it as text, {hint}"))
            continue
        try:
            document.value = _put(document, model, document.value, (), name.strip().split("."), given.value, place)
        except LookupError as error:
            document.mistakes.append(Mistake((name,), place, str(error.args[0])))
        document.value = _long(document, model, document.value, ())


def _put(
    document: Document, kind: Any, current: object, key: Key, rest: Sequence[str], new: object, place: str
) -> object:
    """``current``, found at ``key``, with ``new`` at ``rest`` below it; LookupError where ``rest`` leads nowhere."""
    if not rest:
        brief = not isinstance(new, dict) and isinstance(current, dict) and _section(kind, new) is not None
        long = _long(document, kind, new, key) if brief else new
        keep = isinstance(current, dict) and isinstance(long, dict) and brief
        for written in [(*key, part) for part in long] if keep and isinstance(long, dict) else [key]:
            for old in [k for k in document.places if k[: len(written)] == written]:
                del document.places[old]
            document.places[written] = place
            document.places[_SHORT.get(written, written)] = place
        return {**current, **long} if keep else long  # type: ignore[dict-item]
    name, *below = rest
    if isinstance(current, list):
        if not name.isdecimal() or int(name) > len(current):
            raise LookupError(f"{dotted(key)} is a list of {len(current)}: {name!r} has to be 0 to {len(current)}")
        i = int(name)
        item = current[i] if i < len(current) else None
        value = _put(document, _item(kind), item, (*key, i), below, new, place)
        return [*current[:i], value, *current[i + 1 :]]
    if current is None:
        current = {}
    if not isinstance(current, dict):
        raise LookupError(f"{dotted(key) or 'the file'} is a single value, {shown(current)}; it has no key {name!r}")
    model = _section(kind, current)
    field = model.model_fields.get(name) if model else None
    inner = current.get(name)
    if inner is None and field is not None and below:
        inner = _plain(field.default)
    value = _put(document, field.annotation if field else object, inner, (*key, name), below, new, place)
    return {**current, name: value}


def _plain(default: object) -> object:
    """A field's default as plain values, so that an override can change a part of it."""
    if isinstance(default, BaseModel):
        return default.model_dump(exclude_unset=True)
    return [_plain(d) for d in default] if isinstance(default, tuple) else None


def _long(document: Document, kind: Any, value: object, key: Key) -> object:
    """``value`` with the short forms of its model written out, as the model itself would on reading it."""
    if (model := _section(kind, value)) is not None:
        for name, validator in model.__pydantic_decorators__.model_validators.items():
            if validator.info.mode == "before":
                try:
                    value = getattr(model, name)(value)
                except (TypeError, ValueError):
                    # A short form that cannot be written out beside what else is there; that is the mistake.
                    document.mistakes.append(
                        Mistake(
                            key, document.place(key), f"{shown(value)} mixes short forms with values of another kind"
                        )
                    )
                    return {}
        if isinstance(value, dict):
            fields = model.model_fields
            return {
                k: _long(document, fields[k].annotation, v, (*key, k)) if k in fields else v for k, v in value.items()
            }
    if isinstance(value, list) and (item := _item(kind)) is not None:
        return [_long(document, item, v, (*key, i)) for i, v in enumerate(value)]
    return value


def _members(kind: Any) -> list[Any]:
    """The alternatives of an annotation."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for part in get_args(kind) for member in _members(part)]
    return [kind]


def _section(kind: Any, value: object) -> type[BaseModel] | None:
    """The model that an annotation names; of several the one whose ``type`` the value has, else the first."""
    models = [m for m in _members(kind) if isinstance(m, type) and issubclass(m, BaseModel)]
    if len(models) > 1 and isinstance(value, dict):
        models = [m for m in models if "type" in m.model_fields and m.model_fields["type"].default == value.get("type")]
    return models[0] if models else None


def _item(kind: Any) -> Any:
    """What the members of a list field are; None where it holds plain values of any kind."""
    return next((get_args(m)[0] for m in _members(kind) if get_origin(m) in (tuple, list)), None)
