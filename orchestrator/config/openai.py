"""Requests in the shape of the OpenAI API. Types are strict: a number in quotes is a mistake, not a number."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.config.strict import Strict
from orchestrator.errors import ConfigError

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Part(BaseModel):
    """One part of a message; text is the only kind."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    """Kind of part."""
    text: str
    """The text."""


class Message(BaseModel):
    """One message. Further fields, such as ``reasoning_content``, reach the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who says it."""
    content: str | list[Part] | None = None
    """What is said."""
    tool_calls: list[dict[str, Any]] | None = None
    """Calls that an assistant made."""


class StreamOptions(Strict):
    """How a stream ends."""

    model_config = _STRICT

    include_usage: bool = False
    """Send a last chunk with token counts."""
    include_obfuscation: bool = False
    """Accepted; nothing is padded."""


class _Request(Strict):
    """What chat and plain completions share."""

    model_config = _STRICT

    model: str = Field(max_length=256)
    """Delta (``name``, ``name:7``, ``name@alias``) or the base's own id."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens to generate."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Smallest set of likeliest tokens with this much probability."""
    top_k: int = Field(default=0, ge=0)
    """Only the k likeliest tokens; 0 for all. (Not in OpenAI's API.)"""
    n: int = Field(default=1, ge=1, le=128)
    """Answers to generate."""
    stream: bool | None = False
    """Send the answer in pieces (server-sent events)."""
    stream_options: StreamOptions | None = None
    """How the stream ends."""
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    """Strings that end the answer."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken off a token's logit once the answer has it."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken off a token's logit for each time the answer has it."""
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    """Token id -> what is added to its logit."""
    seed: int | None = None
    """Makes the draw repeatable."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token. (Not in OpenAI's API.)"""
    user: str | None = None
    """Accepted, unused."""

    @property
    def stops(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    """The conversation."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of ``max_tokens``."""
    logprobs: bool | None = False
    """Report each token's log probability."""
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """And that of so many alternatives."""
    tools: list[dict[str, Any]] | None = None
    """Handed to the chat template."""
    tool_choice: Literal["none", "auto"] | None = None
    """``none`` leaves the tools out."""
    parallel_tool_calls: bool | None = None
    """Accepted, unused."""
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    """Only ``{"type": "text"}``."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template, such as ``enable_thinking``. (Not in OpenAI's API.)"""
    metadata: dict[str, str] | None = None
    """Accepted, unused."""
    store: bool | None = None
    """Accepted; nothing is stored."""
    service_tier: str | None = None
    """Accepted, unused."""


class CompletionRequest(_Request):
    """``POST /v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    """Text, token ids, or several of either."""
    logprobs: int | None = Field(default=None, ge=0, le=5)
    """Report log probabilities of the tokens and of so many alternatives."""
    echo: bool | None = False
    """Put the prompt before the answer."""


R = TypeVar("R", ChatRequest, CompletionRequest)


class RequestError(ConfigError):
    """A request is malformed; ``param`` is the field."""

    param: str | None = None


def read_request(kind: type[R], body: bytes) -> R:
    """A request from its JSON.

    Raises:
        RequestError: with every mistake.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = [(".".join(str(step) for step in e["loc"]), e["msg"]) for e in error.errors(include_url=False)]
    more = f" (and {len(found) - 8} more)" if len(found) > 8 else ""
    made = RequestError("; ".join(f"{where}: {what}" if where else what for where, what in found[:8])[:2000] + more)
    made.param = found[0][0].partition(".")[0] or None
    raise made
