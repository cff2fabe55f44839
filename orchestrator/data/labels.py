"""Classification: the label set of the records, and a text with its label as a sample.

The text is what the tokenizer makes of a single sequence, with the special tokens that it puts around one.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from orchestrator.config import Data, Source
from orchestrator.config.data import Format
from orchestrator.config.task import MOST_LABELS
from orchestrator.data.batch import Sample
from orchestrator.data.read import Reader
from orchestrator.data.records import Example, label_of, parse, rename
from orchestrator.data.render import Renderer
from orchestrator.errors import DataError


class TextEncoder(Renderer):
    """Texts and labels to samples.

    Args:
        tokenizer: a transformers tokenizer.
        data: ``length`` is used.
        labels: the label set, in the order of the head's outputs.
        longest: most tokens that the base takes; None where it has no bound.
    """

    layout: Format | None = "label"

    def __init__(self, tokenizer: Any, data: Data, labels: Sequence[str], longest: int | None = None) -> None:
        self.tokenizer, self.data, self.labels = tokenizer, data, tuple(labels)
        self._index = {label: index for index, label in enumerate(self.labels)}
        self._longest = longest
        special = tokenizer("x", return_special_tokens_mask=True)["special_tokens_mask"]
        self._tail = next((n for n, mark in enumerate(reversed(special)) if not mark), 0)

    @property
    def length(self) -> int:
        """Most tokens of a sample."""
        return self.data.length if self._longest is None else min(self.data.length, self._longest)

    @property
    def key(self) -> dict[str, Any]:
        """What samples depend on beside records, tokenizer and ``data``."""
        return {"task": "classification", "labels": self.labels, "longest": self._longest}

    def cut(self, sample: Sample) -> Sample:
        """The first tokens, and the special ones that end a text."""
        if len(sample.tokens) <= self.length:
            return sample
        end = sample.tokens[len(sample.tokens) - self._tail :]
        tokens = [*sample.tokens[: self.length - len(end)], *end]
        return replace(sample, tokens=tokens, trained=[False] * len(tokens))

    def __call__(self, record: Example | Mapping[str, Any]) -> Sample:
        """A sample, not cut. Raises ``DataError`` that says what is wrong, not where the record stands."""
        example = record
        if not isinstance(example, Example):
            example = parse(dict(example), Source(path="record"), self.data, "label")
        if example.labelled is None:
            raise DataError("the task classification needs records with `text` and `label`")
        text, label = example.labelled
        if label not in self._index:
            raise DataError(f"label: {label!r} is not among the {len(self.labels)} labels{_near(label, self.labels)}")
        tokens = self.tokenizer(text)["input_ids"]
        if not tokens:
            raise DataError("text: the tokenizer makes no token of it")
        return Sample(tokens, [False] * len(tokens), label=self._index[label])


def _near(label: str, labels: Sequence[str]) -> str:
    close = get_close_matches(label, labels, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f": {', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}"


def read_labels(sources: Sequence[tuple[Source, Reader, str]], cache: Path) -> tuple[str, ...]:
    """The labels of the records: whole numbers by size, others by name.

    Args:
        sources: each source, its reader and the digest of its records.
        cache: directory where the label set of a source is kept.

    Raises:
        DataError: there are fewer than two labels, or more than a head is made for.
    """
    found: set[str] = set()
    for source, reader, digest in sources:
        found |= _labels_of(source, reader, digest, cache)
        if len(found) > MOST_LABELS:
            raise DataError(
                f"the records have more than {MOST_LABELS:,} labels; is `label` a class? (`columns` renames fields)"
            )
    if len(found) < 2:
        said = f"only the label {next(iter(found))!r}" if found else "no label"
        raise DataError(f"the training records have {said}; a classification needs two or more (`text` and `label`)")
    whole = all(label.removeprefix("-").isdecimal() for label in found)
    return tuple(sorted(found, key=(lambda label: (int(label), label)) if whole else None))


def _labels_of(source: Source, reader: Reader, digest: str, cache: Path) -> set[str]:
    """Bad records are left to those who make samples of them."""
    parts = json.dumps(["labels", digest, source.columns], sort_keys=True)
    kept = cache / f"{hashlib.sha256(parts.encode()).hexdigest()}.labels.json"
    if kept.is_file():
        return set(json.loads(kept.read_text()))
    found: set[str] = set()
    for record in reader.records():
        try:
            found.add(label_of(rename(record.fields or {}, source.columns)))
        except DataError:
            continue
        if len(found) > MOST_LABELS:
            return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(sorted(found)))
        part.replace(kept)
    except OSError as error:
        raise DataError(f"cannot write the labels of {source.path} to {cache}: {error}") from error
    return found
