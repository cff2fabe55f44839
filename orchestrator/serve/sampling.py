"""From logits to the next token of each row, and from tokens to text that is safe to send.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_UNSURE = 16  # tokens that may wait for the rest of a character; more than that is not UTF-8 at all
_CONTEXT = 5  # prompt tokens that decide whether the answer's first token starts with a space


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request wants its tokens picked and when it wants to stop."""

    max_tokens: int
    """Most tokens to generate."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Smallest set of likeliest tokens with this much probability."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    seed: int | None = None
    """Makes the draw repeatable, whatever runs beside it."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time the answer has it."""
    presence_penalty: float = 0.0
    """Taken off a token's logit once the answer has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens."""
    logprobs: int | None = None
    """How many alternatives to report beside each token's own log probability; None for neither."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token (benchmarks)."""

    @property
    def greedy(self) -> bool:
        """Take the likeliest token; so cold that dividing by the temperature would overflow counts as zero."""
        return self.temperature < 1e-5


@dataclass(slots=True)
class Draw:
    """What a row remembers between its draws."""

    params: Sampling
    """The request's wishes."""
    counts: dict[int, int] = field(default_factory=dict)
    """How often the answer has each token; kept only where a penalty asks for it."""
    generator: torch.Generator | None = None
    """The row's own random numbers, on the CPU, so that its batch mates do not shift them."""

    def __post_init__(self) -> None:
        if not self.params.greedy:
            self.generator = torch.Generator()
            if self.params.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.params.seed % 2**63)

    def note(self, token: int) -> None:
        """Count a token that was picked."""
        if self.params.frequency_penalty or self.params.presence_penalty:
            self.counts[token] = self.counts.get(token, 0) + 1


@dataclass(frozen=True, slots=True)
class Picked:
    """One row's next token."""

    token: int
    """Its id; -1 where the row's logits are not finite."""
    logprob: float | None = None
    """Log probability under the model, before temperature and penalties."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log probabilities."""


def pick(logits_BV: Tensor, draws: Sequence[Draw]) -> list[Picked]:
    """The next token of every row. A row with a NaN or an infinity gets token -1; the others do not notice."""
    logits_BV = logits_BV.float()
    top_B, best_B = logits_BV.max(dim=-1)  # NaN wins a maximum, so one look at it finds any
    chosen = best_B
    raw_BV = logits_BV
    shaped = [i for i, d in enumerate(draws) if d.counts or d.params.logit_bias]
    if shaped:
        logits_BV = logits_BV.clone()
        for i in shaped:
            _shape(logits_BV[i], draws[i])
        chosen = logits_BV.argmax(dim=-1)
    drawn = [i for i, d in enumerate(draws) if d.generator is not None]
    if drawn:
        rows = torch.tensor(drawn, device=logits_BV.device)
        chosen = chosen.index_copy(0, rows, _draw(logits_BV[rows], [draws[i] for i in drawn]))
    tokens: list[int] = torch.where(top_B.isfinite(), chosen, -1).tolist()
    picked = [Picked(token) for token in tokens]
    asked = [i for i, d in enumerate(draws) if d.params.logprobs is not None and tokens[i] >= 0]
    for i in asked:
        logp_V = raw_BV[i].log_softmax(-1)
        top = torch.topk(logp_V, min(draws[i].params.logprobs or 0, logp_V.numel()))
        alternatives = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        picked[i] = Picked(tokens[i], float(logp_V[tokens[i]]), alternatives)
    for draw, one in zip(draws, picked, strict=True):
        draw.note(one.token)
    return picked


def _shape(logits_V: Tensor, draw: Draw) -> None:
    """Apply penalties and biases in place."""
    params = draw.params
    if draw.counts:
        seen = torch.tensor(list(draw.counts), device=logits_V.device)
        times = torch.tensor(list(draw.counts.values()), dtype=torch.float32, device=logits_V.device)
        logits_V[seen] -= params.frequency_penalty * times + params.presence_penalty
    for token, bias in params.logit_bias:
        logits_V[token] += bias


def _draw(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One inverse-CDF draw per row; one random number per row and token, so that a seed fixes the answer."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits_BV.device).unsqueeze(1)

    noise_B1 = column([float(torch.rand((), generator=d.generator)) for d in draws])
    logits_BV = logits_BV / column([d.params.temperature for d in draws])
    # A NaN row is reported by ``pick``; here it must only not raise.
    probs_BV = logits_BV.softmax(-1).nan_to_num(0.0)
    if any(d.params.top_p < 1 or d.params.top_k for d in draws):
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        rank_V = torch.arange(sorted_BV.shape[-1], device=logits_BV.device)
        keep_BV = before_BV < column([d.params.top_p if d.params.top_p < 1 else 2.0 for d in draws])
        keep_BV &= rank_V < column([float(d.params.top_k or sorted_BV.shape[-1]) for d in draws])
        keep_BV[:, 0] = True
        index_B1 = _invert(sorted_BV * keep_BV, noise_B1)
        return order_BV.gather(1, index_B1).squeeze(1)
    return _invert(probs_BV, noise_B1).squeeze(1)


def _invert(probs_BV: Tensor, noise_B1: Tensor) -> Tensor:
    """The first index whose cumulative probability exceeds noise x total: never one of probability zero."""
    sums_BV = probs_BV.cumsum(-1)
    wanted_B1 = noise_B1 * sums_BV[:, -1:]
    # Rounding may put noise x total at the total itself: the last index with any probability is meant then.
    last_B1 = (probs_BV > 0).float().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(sums_BV, wanted_B1, right=True), last_B1)


class Detokenizer:
    """Tokens in, text out: never half a character, never the start of a stop string, never the stop string."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._sent = len(self._ids)  # tokens before this one are out
        self._from = 0  # decode from here: some context, since a token's text depends on its left
        self._stop = tuple(stop)
        self._held = ""  # text that may be the start of a stop string
        self.stopped = False
        """A stop string was met."""

    def _decode(self, start: int, end: int | None = None) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def add(self, token: int, last: bool = False) -> str:
        """The text that may be sent now that ``token`` is known; ``last`` sends what was held back."""
        self._ids.append(token)
        return self._flush(last)

    def finish(self) -> str:
        """The text that is still held back."""
        return self._flush(True)

    def _flush(self, last: bool) -> str:
        before = self._decode(self._from, self._sent)
        now = self._decode(self._from)
        whole = not now.endswith("\ufffd") or len(self._ids) - self._sent > _UNSURE
        if (whole or last) and len(now) > len(before):
            self._held += now[len(before) :]
            self._from, self._sent = self._sent, len(self._ids)
        return self._release(last)

    def _release(self, last: bool) -> str:
        if self.stopped:
            return ""
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper start of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
