"""From a request of the API to token ids and to how they are continued."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config.openai import ChatRequest, CompletionRequest, Message
from orchestrator.errors import ServeError
from orchestrator.serve.sampling import Sampling


class Prompter:
    """Renders and tokenizes for one tokenizer. Raises ``ServeError`` for what it cannot render."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer("x")["input_ids"]
        # As in training: a beginning-of-sequence token where the tokenizer puts one, never an end.
        self._begin = [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []

    def chat(self, request: ChatRequest) -> list[int]:
        """A conversation through the chat template, ready for the assistant's answer."""
        if not self._tokenizer.chat_template:
            raise ServeError("this base has no chat template; use /v1/completions")
        tools = None if request.tool_choice == "none" else request.tools
        messages = [_plain(message) for message in request.messages]
        try:
            text = self._render(messages, tools, request.chat_template_kwargs)
        except Exception as error:  # a template is a program of its own and may raise anything
            as_text = [_plain(message, decode=False) for message in request.messages]
            if as_text == messages:
                raise ServeError(f"the chat template refuses these messages: {error}") from error
            try:  # some templates take the arguments of calls as text only
                text = self._render(as_text, tools, request.chat_template_kwargs)
            except Exception as second:
                raise ServeError(f"the chat template refuses these messages: {second}") from second
        return self._encode(text)

    def completions(self, request: CompletionRequest) -> list[list[int]]:
        """Each prompt of a plain completion."""
        prompt = request.prompt
        prompts: Sequence[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        return [self._begin + self._encode(p) if isinstance(p, str) else list(p) for p in prompts]

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token(self, token: int) -> str:
        """One token as text."""
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    def _render(self, messages: list[dict[str, Any]], tools: Any, variables: Mapping[str, Any] | None) -> str:
        reserved = {"tokenize", "add_generation_prompt", "return_dict", "conversation", "tools", "chat_template"}
        if wrong := reserved & set(variables or ()):
            raise ServeError(f"chat_template_kwargs may not set {', '.join(sorted(wrong))}")
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, tokenize=False, **(variables or {})
        )
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _plain(message: Message, decode: bool = True) -> dict[str, Any]:
    """A message as templates expect it: text as one string, call arguments as a mapping."""
    plain = message.model_dump(exclude_none=True)
    if message.role == "developer":
        plain["role"] = "system"
    if isinstance(message.content, list):
        plain["content"] = "".join(part.text for part in message.content)
    plain.setdefault("content", "")
    if message.tool_calls and decode:
        plain["tool_calls"] = [_call(call) for call in message.tool_calls]
    return plain


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
        except ValueError:
            return dict(call)
    return dict(call)


def sampling(request: ChatRequest | CompletionRequest, max_tokens: int, choice: int, vocabulary: int) -> Sampling:
    """How one choice of a request is to be generated.

    Raises:
        ServeError: ``logit_bias`` names no token, or ``top_logprobs`` is given without ``logprobs``.
    """
    bias = []
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal() and int(key) < vocabulary):
            raise ServeError(f"logit_bias: {key[:40]!r} is not a token id; ids are 0..{vocabulary - 1}")
        bias.append((int(key), value))
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise ServeError("top_logprobs needs logprobs: true")
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    else:
        logprobs = request.logprobs
    return Sampling(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=None if request.seed is None else request.seed + choice,
        stop=request.stops,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        logit_bias=tuple(bias),
        logprobs=logprobs,
        ignore_eos=request.ignore_eos,
    )
