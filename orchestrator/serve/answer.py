"""What the endpoint says, in the shape of the OpenAI API. Plain dictionaries; no HTTP."""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.serve.request import Event
from orchestrator.serve.sampling import Picked


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def failure(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Answer:
    """One answer of one request: its envelope, whole or in chunks.

    Args:
        model: the name that was asked for.
        fingerprint: which version answers.
        token: a token id as text.
        logprobs: whether log probabilities are reported.
        usage_null: whether chunks carry ``usage: null`` (the last one has the counts).
    """

    prefix = ""
    whole = ""
    chunk = ""

    def __init__(
        self, model: str, fingerprint: str, token: Callable[[int], str], logprobs: bool, usage_null: bool = False
    ) -> None:
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model, self._fingerprint, self._token = model, fingerprint, token
        self.logprobs, self._usage_null = logprobs, usage_null

    def envelope(self, kind: str, choices: list[dict[str, Any]], counts: dict[str, int] | None) -> dict[str, Any]:
        """The outer record."""
        made: dict[str, Any] = {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }
        if counts is not None:
            made["usage"] = counts
        elif self._usage_null:
            made["usage"] = None
        return made

    def complete(self, choices: list[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
        """The whole answer."""
        return self.envelope(self.whole, choices, counts)

    def piece(self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
        """One chunk."""
        return self.envelope(self.chunk, choices, counts)

    def first(self, index: int, echo: str) -> dict[str, Any] | None:
        """A chunk before the first token, where the API has one."""
        raise NotImplementedError

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """The choice of a chunk."""
        raise NotImplementedError

    def choice(self, index: int, events: Sequence[Event], echo: str) -> dict[str, Any]:
        """The choice of a whole answer."""
        raise NotImplementedError

    def _picked(self, events: Sequence[Event]) -> list[Picked]:
        return [event.picked for event in events if event.picked is not None]


class Chat(Answer):
    """``chat.completion``."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int, echo: str) -> dict[str, Any]:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """Text to append."""
        delta = {"content": event.text} if event.text or event.finish is None else {}
        return {"index": index, "delta": delta, "logprobs": self._logs([event]), "finish_reason": event.finish}

    def choice(self, index: int, events: Sequence[Event], echo: str) -> dict[str, Any]:
        """The message."""
        message = {"role": "assistant", "content": "".join(event.text for event in events), "refusal": None}
        finish = events[-1].finish
        return {"index": index, "message": message, "logprobs": self._logs(events), "finish_reason": finish}

    def _logs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {**self._log(p.token, p.logprob or 0.0), "top_logprobs": [self._log(*one) for one in p.top]}
            for p in self._picked(events)
        ]
        return {"content": content, "refusal": None}

    def _log(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        # The bytes of half a character cannot be had back from its text.
        return {
            "token": text,
            "logprob": max(logprob, -9999.0),
            "bytes": None if "\ufffd" in text else [*text.encode()],
        }


class Completion(Answer):
    """``text_completion``."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def first(self, index: int, echo: str) -> dict[str, Any] | None:
        """The prompt, where it is to be repeated."""
        return {"index": index, "text": echo, "logprobs": None, "finish_reason": None} if echo else None

    def delta(self, index: int, event: Event) -> dict[str, Any]:
        """Text to append."""
        return {"index": index, "text": event.text, "logprobs": self._logs([event]), "finish_reason": event.finish}

    def choice(self, index: int, events: Sequence[Event], echo: str) -> dict[str, Any]:
        """The text."""
        text = echo + "".join(event.text for event in events)
        return {"index": index, "text": text, "logprobs": self._logs(events), "finish_reason": events[-1].finish}

    def _logs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        picked = self._picked(events)
        offsets, at = [], 0
        for event in events:
            if event.picked is not None:
                offsets.append(at)
            at += len(event.text)
        return {
            "tokens": [self._token(p.token) for p in picked],
            "token_logprobs": [max(p.logprob or 0.0, -9999.0) for p in picked],
            "top_logprobs": [{self._token(t): max(v, -9999.0) for t, v in p.top} for p in picked],
            "text_offset": offsets,
        }
