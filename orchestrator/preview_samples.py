"""Samples of a run as text: the trained tokens marked, or the label of each."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator.config import Classification, Task
from orchestrator.data import Sample

EDGE = 160
"""Tokens shown at each end of a longer sample."""
_LEAD = 8
"""Tokens read before the end part of a cut sample, so that it begins with a whole character."""
_TRAINED = "bold green"
CONTROL = {c: (0x2421 if c == 0x7F else 0x2400 + c) for c in (*range(32), 0x7F) if chr(c) not in "\n\t"}
"""Control characters, as a terminal would obey them, to their pictures."""
CONTROL |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def pieces(tokenizer: Any, sample: Sample, first: int = 0, last: int | None = None) -> Iterator[tuple[int, str, bool]]:
    """The tokens from ``first`` to ``last`` as text: index behind the piece, its text, whether it is trained.

    A piece is one token, or the few that share a character. Special tokens are text like any other. A sample's first
    token is nobody's next one, so it is never trained.
    """
    tokens = sample.tokens[:last]
    start, before = first, first
    for end in range(first + 1, len(tokens) + 1):
        target = sample.trained[start] and start > 0
        closes = end == len(tokens) or (sample.trained[end] and end > 0) != target
        # A decoder may look at what stands before (some put no blank at the start), so the last piece goes with it.
        head, whole = _decode(tokenizer, tokens[before:start]), _decode(tokenizer, tokens[before:end])
        text = whole[len(head) :] if whole.startswith(head) else _decode(tokenizer, tokens[start:end])
        if text.endswith("\ufffd") and not closes:
            continue  # the rest of the character is in the next token
        yield end, text, target
        before, start = start, end


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    if not tokens:
        return ""
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def print_samples(console: Console, tokenizer: Any, samples: list[Sample], task: Task) -> None:
    """Some samples; on a terminal trained tokens are coloured, elsewhere they stand between « and »."""
    if isinstance(task, Classification):
        _print_texts(console, tokenizer, samples, task.labels or ())
        return
    marks = ("", "") if console.is_terminal and console.color_system and not console.no_color else ("«", "»")
    how = f"between {' and '.join(marks)}" if marks[0] else "coloured"
    console.print(Text("Samples", "bold").append(f"  trained tokens {how}", "dim"))
    for number, sample in enumerate(samples, 1):
        count = f"{len(sample.tokens):,} tokens, {sample.targets:,} of them trained"
        console.print(Text(f"  {number}: {count}", "cyan"), soft_wrap=True)
        console.print(_shown(tokenizer, sample, marks), soft_wrap=True, highlight=False)
    console.print()


def _print_texts(console: Console, tokenizer: Any, samples: list[Sample], labels: tuple[str, ...]) -> None:
    """Texts to classify; no token of theirs is trained."""
    console.print(Text("Samples", "bold"))
    for number, sample in enumerate(samples, 1):
        assert sample.label is not None
        line = Text(f"  {number}: {len(sample.tokens):,} tokens, label ", "cyan")
        line.append(labels[sample.label].translate(CONTROL), _TRAINED)
        console.print(line, soft_wrap=True, highlight=False)
        console.print(_shown(tokenizer, sample, ("", "")), soft_wrap=True, highlight=False)
    console.print()


def _shown(tokenizer: Any, sample: Sample, marks: tuple[str, str]) -> Text:
    """The sample, without its middle where it is long."""
    count = len(sample.tokens)
    text, cut = Text(), slice(EDGE, count - EDGE)
    if count <= 2 * EDGE + _LEAD:
        return _append(text, ((piece, target) for _, piece, target in pieces(tokenizer, sample)), marks)
    _append(text, ((piece, target) for _, piece, target in pieces(tokenizer, sample, 0, EDGE)), marks)
    trained = f", {sum(sample.trained[cut]):,} of them trained" if sample.label is None else ""
    text.append(f" … {count - 2 * EDGE:,} tokens{trained} … ", "dim italic")
    rest = pieces(tokenizer, sample, cut.stop - _LEAD)
    return _append(text, ((piece, target) for end, piece, target in rest if end > cut.stop), marks)


def _append(text: Text, parts: Iterable[tuple[str, bool]], marks: tuple[str, str]) -> Text:
    for target, run in groupby(parts, key=lambda part: part[1]):
        said = "".join(piece for piece, _ in run).translate(CONTROL)
        if target:
            text.append(marks[0], "dim").append(said, _TRAINED).append(marks[1], "dim")
        else:
            text.append(said)
    return text
