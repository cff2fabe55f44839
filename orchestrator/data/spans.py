"""Where the assistant's turns stand in a rendered conversation, in characters, for any chat template.

A turn is what the model has to say after the generation prompt, through its end-of-turn marker. In order of preference:

1. the template's own ``{% generation %}`` marks;
2. prefixes: the conversation up to the turn, rendered with the generation prompt, and through the turn; what the second
   has more than the first is the turn, wherever the whole has the same text at that place (a template that drops the
   reasoning of earlier turns has not);
3. differences: the whole is rendered again with the turn replaced by a word that occurs nowhere. The two texts
   part where the turn stands; the template's header before it and its marker after it bound the turn.

What cannot be located raises ``DataError``; nothing is guessed.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from orchestrator.errors import DataError

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"(\{%-?)\s*generation\s*(-?%\})")
_END_GENERATION = re.compile(r"(\{%-?)\s*endgeneration\s*(-?%\})")
_OPEN, _CLOSE = "\ue0f2", "\ue0f3"  # private use
_WORD = "\u2402turn\u2403"  # control pictures: in no conversation, and trimmed by no template


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a template puts around an assistant's turn."""

    header: str
    """The generation prompt."""
    common: str
    """Its part that also stands before the turns of a finished conversation."""
    lead: str
    """What stands between that part and the text of a turn."""
    marker: str
    """What ends a turn: the text after it, through its last special token; empty where there is none."""


class ChatTemplate:
    """A tokenizer's chat template, and where it puts the assistant's turns."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        words = {str(t) for t in tokenizer.all_special_tokens}
        words |= {str(t) for t in tokenizer.added_tokens_decoder.values() if getattr(t, "special", False)}
        self._special = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")
        self._frame: _Frame | None = None

    def turns(self, messages: list[Message], tools: list[Message] | None, wanted: list[int]) -> tuple[str, list[Span]]:
        """The rendered conversation, and the spans of the wanted assistant messages in order (none may be empty)."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        marks = self._marks(messages, tools)
        if marks is not None:
            whole, marked = marks
            spans = [self._close(whole, s) for s in marked]
            if wanted == turns:
                return whole, spans
            if len(spans) == len(turns):
                return whole, [s for i, s in zip(turns, spans, strict=True) if i in wanted]
        else:
            whole, spans = self.text(messages, tools), None
        located = [
            self._by_prefix(whole, messages, tools, i) or self._by_difference(whole, messages, tools, i) for i in wanted
        ]
        if any(a[1] > b[0] for a, b in pairwise(located)):
            raise DataError("the chat template mixes the assistant's turns, so they cannot be told apart")
        if spans is not None:  # the template's marks say what is learnt within the wanted turns
            located = [s for s in spans if any(a <= s[0] < b for a, b in located)]
        return whole, located

    def text(
        self,
        messages: list[Message],
        tools: list[Message] | None = None,
        *,
        ask: bool = False,
        template: str | None = None,
    ) -> str:
        """The conversation as text; ``ask`` adds the generation prompt. Raises ``DataError`` as the template does."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=ask
            )
        except Exception as error:  # a template is a program of its own and may raise anything
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return str(text)

    def frame(self) -> _Frame:
        """Probed with the smallest conversation, once."""
        if self._frame is None:
            ask = [{"role": "user", "content": "x"}]
            before, header = self.text(ask), self.text(ask, ask=True)
            answered = self.text([*ask, {"role": "assistant", "content": _WORD}])
            if not (header.startswith(before) and answered.startswith(before) and _WORD in answered):
                raise DataError("the chat template does not append turns, so the assistant's cannot be located")
            at = answered.index(_WORD)
            common = _shared(header[len(before) :], answered[len(before) : at])
            tail = answered[at + len(_WORD) :]
            ends = [m.end() for m in self._special.finditer(tail)]
            lead = answered[len(before) + len(common) : at]
            self._frame = _Frame(header[len(before) :], common, lead, tail[: ends[-1]] if ends else "")
        return self._frame

    def _marks(self, messages: list[Message], tools: list[Message] | None) -> tuple[str, list[Span]] | None:
        """The whole and its ``{% generation %}`` spans; None where the template has no such marks."""
        template = self.tokenizer.get_chat_template(None, tools)
        if not _GENERATION.search(template):
            return None
        # A block in place of the block, since Jinja treats the blanks around blocks in its own way.
        opened = _GENERATION.sub(rf"\1 if true %}}{_OPEN}{{% endif \2", template)
        marked = self.text(
            messages, tools, template=_END_GENERATION.sub(rf"\1 if true %}}{_CLOSE}{{% endif \2", opened)
        )
        whole, spans, start = "", [], None
        for part in re.split(f"([{_OPEN}{_CLOSE}])", marked):
            if part == _OPEN:
                start = len(whole)
            elif part == _CLOSE and start is not None:
                spans.append((start, len(whole)))
                start = None
            else:
                whole += part
        if whole != self.text(messages, tools):
            raise DataError("the chat template's {% generation %} marks cannot be followed in this conversation")
        return whole, [s for s in spans if s[0] < s[1]]

    def ends_turn(self, text: str) -> bool:
        """Whether the text ends with a special token."""
        return any(m.end() == len(text) for m in self._special.finditer(text))

    def _close(self, whole: str, span: Span) -> Span:
        """The span through its end-of-turn marker, which a template may leave outside its marks, and no further."""
        start, end = span
        bare = start + len(whole[start:end].rstrip())
        if self.ends_turn(whole[start:bare]):
            return start, bare
        marker = self.frame().marker
        return start, end + len(marker) if marker and whole.startswith(marker, end) else end

    def _by_prefix(self, whole: str, messages: list[Message], tools: list[Message] | None, index: int) -> Span | None:
        """See the module's second way; None where it does not hold."""
        try:
            before, through = self.text(messages[:index], tools, ask=True), self.text(messages[: index + 1], tools)
        except DataError:
            return None  # a template may refuse a part of a conversation whose whole it renders
        if not through.startswith(before):
            return None
        if whole.startswith(through):
            return self._close(whole, (len(before), len(through)))
        # What came earlier was rendered otherwise, but the turn itself may still be the same: header, text and all.
        header, turn = self.frame().header, through[len(before) :]
        if not before.endswith(header) or not self._special.search(turn):
            return None
        alike = [i for i, m in enumerate(messages) if m == messages[index]]
        found = [m.end() for m in re.finditer(f"{re.escape(header)}(?={re.escape(turn)})", whole)]
        if len(found) != len(alike):
            return None
        start = found[alike.index(index)]
        return self._close(whole, (start, start + len(turn)))

    def _by_difference(self, whole: str, messages: list[Message], tools: list[Message] | None, index: int) -> Span:
        """See the module's third way."""
        plain = [*messages]
        plain[index] = {"role": "assistant", "content": _WORD}
        try:
            other = self.text(plain, tools)
        except DataError:  # such as a tool's answer that no longer follows a call
            plain[index] = {**messages[index], "content": _WORD}
            other = self.text(plain, tools)
        if other.count(_WORD) != 1:
            raise DataError(f"messages[{index}]: the chat template drops this turn, so it cannot be learnt")
        first = len(_shared(whole, other))
        last = len(whole) - len(_shared(whole[::-1], other[::-1]))
        frame = self.frame()
        if frame.common:
            at = whole.rfind(frame.common, 0, first)
            start = at + len(frame.header if whole.startswith(frame.header, at) else frame.common)
        else:  # without a header the turn begins with what the template puts before its text
            lead = frame.lead if other[: other.index(_WORD)].endswith(frame.lead) else ""
            at = start = other.index(_WORD) - len(lead)
        if at < 0 or at > first or (frame.marker and frame.marker in whole[at:first]):
            raise DataError(
                f"messages[{index}]: the assistant's turn cannot be located in what the chat template makes of it; "
                "a template with {% generation %} marks, or `loss_on: all`, would do"
            )
        for match in self._special.finditer(whole, start):
            if match.start() < last < match.end():  # the two texts may share half of a marker
                last = match.end()
        return self._close(whole, (start, max(last, start)))


def _shared(a: str, b: str) -> str:
    """What both texts begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # halving compares at C speed, character by character would not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return a[:low]
