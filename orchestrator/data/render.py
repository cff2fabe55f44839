"""Records to samples: the text, which of its tokens are targets, and how it ends.

End of sequence. A chat template closes an assistant's turn with a marker; it is a target like the turn itself (what
the template writes after it is not). Where a template has no such marker, and where no template is used, the
tokenizer's end-of-sequence token closes the sample and is a target.

Prompt and completion are tokenized apart, as at inference, so that no token spans the two.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.config import Data, Source
from orchestrator.config.data import Format
from orchestrator.data.batch import Sample
from orchestrator.data.records import Example, parse
from orchestrator.data.spans import ChatTemplate
from orchestrator.errors import DataError

RULES = 1
"""Version of the rules of this module and of those it uses: part of the key of every cache of samples."""

Piece = tuple[str, bool]
"""Text, and whether it is a target."""


def render(record: Example | Mapping[str, Any], tokenizer: Any, data: Data) -> Sample:
    """One record as a sample, not truncated. Raises ``DataError`` that says what is wrong, not where the record stands.

    Args:
        record: An example, or the fields of a record whose layout is read off their names.
        tokenizer: A transformers tokenizer.
        data: ``loss_on``, ``chat`` and ``tools_key`` are used.
    """
    return Renderer(tokenizer, data)(record)


def truncate(sample: Sample, length: int) -> Sample:
    """The first ``length`` tokens."""
    return replace(sample, tokens=sample.tokens[:length], trained=sample.trained[:length])


class Renderer:
    """``render`` for many records of one tokenizer."""

    layout: Format | None = None
    """The layout that all records must have; None for any."""

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self.tokenizer, self.data = tokenizer, data
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        if data.chat == "always" and self.template is None:
            raise DataError(
                "data.chat is `always`, but the base's tokenizer has no chat template; use `auto` or `never`"
            )
        ids = tokenizer("x")["input_ids"]
        self._bos = [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []
        # SentencePiece-like tokenizers put a blank before whatever they are given, so pieces need their context.
        bare = tokenizer.convert_ids_to_tokens(tokenizer("x", add_special_tokens=False)["input_ids"])
        self._whole = bool(bare) and bare[0].startswith("\u2581")

    @property
    def length(self) -> int:
        """Most tokens of a sample."""
        return self.data.length

    @property
    def key(self) -> dict[str, Any]:
        """What samples depend on beside records, tokenizer and ``data`` (JSON)."""
        return {}

    def cut(self, sample: Sample) -> Sample:
        """The sample, no longer than ``length``."""
        return truncate(sample, self.length)

    def __call__(self, record: Example | Mapping[str, Any]) -> Sample:
        """See ``render``."""
        data = self.data
        example = record if isinstance(record, Example) else parse(dict(record), Source(path="record"), data)
        if data.loss_on == "flagged" and (example.messages is None or example.prompt is not None):
            raise DataError("data.loss_on is `flagged`, which needs records with `messages`")
        if example.text is not None:
            return self._encode([(example.text, True)], bos=True, eos=True)
        assert example.messages is not None
        if example.prompt is None or (data.chat != "never" and self.template is not None):
            try:
                return self._chat(example.messages, example)
            except DataError:
                if (messages := _text_arguments(example.messages)) == example.messages:
                    raise
            return self._chat(messages, example)  # some templates take the arguments of calls as text only
        assert example.completion is not None
        pieces = [(example.prompt, data.loss_on == "all"), (example.completion, True)]
        return self._encode(pieces, bos=True, eos=True)

    def _chat(self, messages: list[dict[str, Any]], example: Example) -> Sample:
        if self.template is None:
            raise DataError("holds `messages`, but the base's tokenizer has no chat template to render them")
        if self.data.loss_on == "all":
            whole = self.template.text(messages, example.tools)
            return self._encode([(whole, True)], bos=False, eos=not self.template.ends_turn(whole.rstrip()))
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        wanted = {"last": turns[-1:], "flagged": sorted(example.flagged)}.get(self.data.loss_on, turns)
        whole, spans = self.template.turns(messages, example.tools, wanted)
        eos = (
            bool(spans) and not whole[spans[-1][1] :].strip() and not self.template.ends_turn(whole[slice(*spans[-1])])
        )
        pieces, at = [], 0
        for start, end in spans:
            pieces += [(whole[at:start], False), (whole[start:end], True)]
            at = end
        return self._encode(pieces if eos else [*pieces, (whole[at:], False)], bos=False, eos=eos)

    def _encode(self, pieces: list[Piece], *, bos: bool, eos: bool) -> Sample:
        """Tokens of the pieces; ``bos`` where the tokenizer begins texts with one, ``eos`` as a trained last token."""
        if any("\ud800" <= char <= "\udfff" for text, _ in pieces if not text.isascii() for char in text):
            raise DataError("holds half of a UTF-16 surrogate pair, which is no character")
        tokens = list(self._bos) if bos else []
        trained = [False] * len(tokens)
        for ids, target in self._in_context(pieces) if self._whole else self._apart(pieces):
            tokens += ids
            trained += [target] * len(ids)
        if eos:
            if self.tokenizer.eos_token_id is None:
                raise DataError(
                    "the base's tokenizer has no end-of-sequence token, which ends a record without a template"
                )
            tokens.append(self.tokenizer.eos_token_id)
            trained.append(True)
        return Sample(tokens, trained)

    def _apart(self, pieces: list[Piece]) -> list[tuple[list[int], bool]]:
        return [(self.tokenizer(text, add_special_tokens=False)["input_ids"], t) for text, t in pieces if text]

    def _in_context(self, pieces: list[Piece]) -> list[tuple[list[int], bool]]:
        """The whole text's tokens; a token belongs to the last piece it reaches into."""
        text = "".join(t for t, _ in pieces)
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends, at = [], 0
        for piece, target in pieces:
            at += len(piece)
            ends.append((at, target))
        result, piece_index = [], 0
        for token, (_, end) in zip(out["input_ids"], out["offset_mapping"], strict=True):
            while piece_index < len(ends) - 1 and end > ends[piece_index][0]:
                piece_index += 1
            result.append(([token], ends[piece_index][1]))
        return result


def _text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the arguments of its tool calls as JSON text."""
    changed = []
    for message in messages:
        calls = [
            {**c, "function": {**c["function"], "arguments": json.dumps(c["function"].get("arguments", {}))}}
            for c in message.get("tool_calls", ())
        ]
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed
