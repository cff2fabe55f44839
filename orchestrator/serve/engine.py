"""Continuous batching: many requests, each with its own delta, in one forward per step.

One thread owns the model, the cache and the bank. Between two steps it takes in new requests, cancellations and
commands; a step reads one chunk of waiting prompts, then decodes one token for every running row.
Shapes: B rows of a forward, T new tokens of each, V vocabulary.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from orchestrator.errors import ServeError
from orchestrator.serve.cache import Masks, SlotCache, window
from orchestrator.serve.request import BusyError, Event, Request, Stats, Ticket
from orchestrator.serve.row import Row
from orchestrator.serve.sampling import Picked, pick

log = logging.getLogger("manta.serve")


class Routes(Protocol):
    """The part of a bank that the engine needs."""

    def routed(
        self, slot_BT: Tensor, *, position_BT: Tensor | None = None, prefixed: bool = True
    ) -> AbstractContextManager[Any]:
        """Inside it, a forward of the model adds to each token what its slot's delta says."""

    def lead(self, slot: int) -> tuple[int, int]:
        """A slot's virtual tokens and length of prefix."""

    def changes_head(self, slot: int) -> bool:
        """Whether a slot adds to the logits of the base's own head."""

    def prefix(self, slot: int) -> dict[int, tuple[Tensor, Tensor]]:
        """A slot's prefix, keys and values [heads, P, D], of each layer."""


class Engine:
    """Owns a model's decoding. ``submit`` and ``call`` may be used from any thread.

    Raises ``ServeError`` for a model that it cannot serve.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        bank: Routes,
        *,
        rows: int = 16,
        length: int = 1024,
        max_queued: int = 256,
        prefill_chunk: int = 256,
    ) -> None:
        config = model.config.get_text_config()  # type: ignore[operator,union-attr]
        most = getattr(config, "max_position_embeddings", None) or length
        if most < length:
            log.warning("the base knows %d positions: requests are limited to that, not to length=%d", most, length)
        self.length, self.rows, self.max_queued = min(length, most), rows, max_queued
        self.vocabulary = int(config.vocab_size)
        self.eos = _ends(model, tokenizer)
        self.stats = Stats()
        self._model, self._tokenizer, self._bank = model.eval(), tokenizer, bank
        self._chunk = prefill_chunk
        self._device = next(model.parameters()).device
        self._masks = Masks(model)
        self._cache = SlotCache(rows, self.length)
        self._rows: list[Row] = []  # decoding ones first
        self._decoding = 0
        self._order = itertools.count()
        self._waiting: deque[Ticket] = deque()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._mail: list[tuple[Ticket, Event]] = []
        self._load = 0  # requests taken in and not finished
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="manta-engine", daemon=True)
        self._thread.start()

    # -- from any thread ------------------------------------------------------------------------------------------

    def room(self, slot: int) -> int:
        """Most tokens of prompt and answer together; what a delta puts before them takes its part."""
        return self.length - sum(self._bank.lead(slot))

    def submit(self, requests: Sequence[Request], *, loop: asyncio.AbstractEventLoop | None = None) -> list[Ticket]:
        """Take in all of ``requests`` or none.

        Raises:
            BusyError: too many are waiting, or the engine is closed.
            ServeError: a prompt is empty or too long, or a token id is out of range.
        """
        for request in requests:
            if not request.prompt:
                raise ServeError("the prompt is empty; it must have at least one token")
            room = self.room(request.slot)
            if len(request.prompt) + request.sampling.max_tokens > room:
                raise ServeError(
                    f"{len(request.prompt)} prompt tokens + max_tokens {request.sampling.max_tokens} "
                    f"exceed the limit of {room} tokens"
                )
            if not all(0 <= token < self.vocabulary for token in request.prompt):
                raise ServeError(f"a token id is outside 0..{self.vocabulary - 1}")
        tickets = [Ticket(request, loop) for request in requests]
        with self._wake:
            if self._closing:
                raise BusyError("the endpoint is shutting down")
            if self._load + len(tickets) > self.rows + self.max_queued:
                self.stats.rejected += len(tickets)
                raise BusyError(f"{self._load} requests are running or waiting, the most this endpoint takes")
            self._load += len(tickets)
            self._waiting.extend(tickets)
            self._wake.notify()
        self.stats.requests += len(tickets)
        return tickets

    def call(self, command: Callable[[], Any]) -> "Future[Any]":
        """Run ``command`` on the engine's thread between two steps."""
        future: Future[Any] = Future()
        with self._wake:
            if self._closing:
                raise ServeError("the engine is shutting down")
            self._commands.append((command, future))
            self._wake.notify()
        return future

    def healthy(self, patience_s: float = 120.0) -> bool:
        """The thread lives, and no step has been running for longer than ``patience_s``."""
        began = self.stats.step_began
        return self._thread.is_alive() and (began is None or time.monotonic() - began < patience_s)

    def close(self, timeout_s: float = 30.0) -> None:
        """End the thread; what still runs fails with an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._commands or self._waiting or self._rows):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
                if self._closing:
                    break
            for command, future in commands:
                _complete(command, future)
            self.stats.step_began = time.monotonic()
            try:
                with torch.inference_mode():
                    self._step()
            except Exception as error:
                log.exception("a step failed; its requests are answered with an error")
                self._abandon(error)
            self.stats.step_began = None
            self._post()
        for _, future in commands:
            future.set_exception(ServeError("the engine is shutting down"))
        self._abandon(ServeError("the endpoint is shutting down"))
        while self._waiting:
            self._done(self._waiting.popleft(), Event(finish="error", error="the endpoint is shutting down"))
        self._post()

    def _step(self) -> None:
        for row in [row for row in self._rows if row.ticket.cancelled]:
            self._remove(row, Event(finish="cancelled"))
        self._admit()
        if lines := self._prompts():
            self._advance(lines)
        if self._decoding:
            self._advance([(row, 1) for row in self._rows[: self._decoding]])
        self.stats.steps += 1
        self.stats.running, self.stats.waiting = len(self._rows), len(self._waiting)

    def _admit(self) -> None:
        with self._wake:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
            free = self.rows - len(self._rows)
            admitted = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        for ticket in gone:
            self._done(ticket, Event(finish="cancelled"))
        for ticket in admitted:
            slot = ticket.request.slot
            row = Row.of(ticket, next(self._order), len(self._rows), self._bank.lead(slot), self._tokenizer)
            self._rows.append(row)
            self.stats.prompt_tokens += len(ticket.request.prompt)
            if row.prefix:
                try:
                    self._cache.put(row.index, self._bank.prefix(slot), self._masks.dtype)
                except Exception as error:
                    self._fail(row, error)

    def _prompts(self) -> list[tuple[Row, int]]:
        """Rows whose prompts are read in this step, oldest first: no more padded tokens than one chunk."""
        lines: list[tuple[Row, int]] = []
        longest = 0
        for row in sorted(self._rows[self._decoding :], key=lambda row: row.order):
            count = min(self._chunk, row.left)
            longest = max(longest, count)
            if lines and (len(lines) + 1) * longest > self._chunk:
                break
            lines.append((row, count))
        return sorted(lines, key=lambda line: line[0].index)

    def _advance(self, lines: list[tuple[Row, int]]) -> None:
        """Feed ``count`` more tokens of each row; a row whose prompt is through gets its next token.

        Where the forward raises, each half is tried alone, so that only the rows that cause it fail. Trying again
        is safe: the same keys and values are written to the same places.
        """
        try:
            logits_BV = self._forward(lines)
        except Exception as error:
            if len(lines) == 1:
                log.warning("a request failed: %s", error)
                self._fail(lines[0][0], error)
            else:
                half = len(lines) // 2
                self._advance(lines[:half])
                self._advance(lines[half:])
            return
        for row, count in lines:
            row.cached += count
        ready = [line for line, (row, _) in enumerate(lines) if not row.left]
        if not ready:
            return
        rows = [lines[line][0] for line in ready]
        picked = pick(logits_BV if len(ready) == len(lines) else logits_BV[ready], [row.draw for row in rows])
        for row, one in zip(rows, picked, strict=True):
            if row.index >= self._decoding:
                self._promote(row)
            self._accept(row, one)

    def _forward(self, lines: list[tuple[Row, int]]) -> Tensor:
        """Logits [B, V] after the last token of each line."""
        counts = [count for _, count in lines]
        longest = max(counts)
        tokens, positions = [], []
        for row, count in lines:
            pad = longest - count  # a padded query repeats the last position; nothing of it is kept
            tokens.append(row.tokens[row.cached : row.cached + count] + [0] * pad)
            positions.append([*range(row.cached, row.cached + count)] + [row.cached + count - 1] * pad)
        device = self._device
        token_BT, position_BT = torch.tensor(tokens, device=device), torch.tensor(positions, device=device)
        # On the CPU: the bank reads it there.
        slot_BT = torch.tensor([[row.ticket.request.slot] * longest for row, _ in lines])
        view = window([row.index for row, _ in lines], [row.cached for row, _ in lines], counts, device)
        ends = sorted({count - 1 for count in counts})
        if any(self._bank.changes_head(row.ticket.request.slot) for row, _ in lines):
            ends = list(range(longest))  # a delta of the head is told by token, so the head sees all of them
        self._cache.window = view
        mask = self._masks(position_BT, view.length, [row.prefix for row, _ in lines])
        with self._bank.routed(slot_BT, position_BT=position_BT, prefixed=False):  # prefixes are in the cache
            logits: Tensor = self._model(
                input_ids=token_BT,
                position_ids=position_BT,
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=torch.tensor(ends, device=device),
            ).logits
        self._cache.window = None
        if len(ends) == 1:
            return logits[:, 0]
        which = torch.tensor([ends.index(count - 1) for count in counts], device=device)
        return logits[torch.arange(len(lines), device=device), which]

    def _accept(self, row: Row, picked: Picked) -> None:
        """Append a token to a row, and end the row where it ends."""
        params = row.ticket.request.sampling
        if picked.token < 0:
            self._fail(row, ServeError("the model's output is not finite (NaN or infinity); the delta is broken"))
            return
        row.ticket.generated += 1
        self.stats.generated_tokens += 1
        if picked.token in self.eos and not params.ignore_eos:
            self._remove(row, Event(row.text.finish(), finish="stop"))
            return
        row.tokens.append(picked.token)
        text = row.text.add(picked.token)
        full = row.ticket.generated >= params.max_tokens
        if full and not row.text.stopped:
            text += row.text.finish()
        if row.text.stopped or full:
            self._remove(row, Event(text, picked, finish="stop" if row.text.stopped else "length"))
        else:
            self._mail.append((row.ticket, Event(text, picked)))

    def _promote(self, row: Row) -> None:
        """From reading its prompt to decoding: the row takes the place behind the last decoding one."""
        other = self._rows[self._decoding]
        if other is not row:
            self._cache.swap(row.index, other.index, max(row.cached, other.cached))
            self._rows[row.index], self._rows[other.index] = other, row
            row.index, other.index = other.index, row.index
        self._decoding += 1

    def _remove(self, row: Row, event: Event) -> None:
        """Take a row out; the last row of its kind moves into the hole, and the last of all into that one's."""
        hole = row.index
        # A masked key still takes part in a product: no NaN or infinity may stay for the next owner.
        self._cache.wipe(hole, row.cached + self._chunk)
        if hole < self._decoding:
            self._decoding -= 1
            hole = self._fill(hole, self._decoding)
        self._fill(hole, len(self._rows) - 1)
        self._rows.pop()
        self._done(row.ticket, event)

    def _fill(self, hole: int, source: int) -> int:
        """Move row ``source`` to ``hole``; the hole that this leaves."""
        if hole != source:
            moved = self._rows[source]
            self._cache.move(source, hole, moved.cached)
            self._rows[hole], moved.index = moved, hole
        return source

    def _fail(self, row: Row, error: Exception) -> None:
        self.stats.failed += 1
        message = str(error) or type(error).__name__
        self._remove(row, Event(finish="error", error=message))

    def _abandon(self, error: Exception) -> None:
        """Fail every running row and start afresh, whatever state they are in."""
        rows, self._rows, self._decoding = self._rows, [], 0
        self._cache = SlotCache(self.rows, self.length)
        self.stats.failed += len(rows)
        for row in rows:
            self._done(row.ticket, Event(finish="error", error=str(error) or type(error).__name__))

    def _done(self, ticket: Ticket, event: Event) -> None:
        with self._wake:
            self._load -= 1
        self.stats.cancelled += event.finish == "cancelled"
        self._mail.append((ticket, event))
        if ticket.request.on_done is not None:
            ticket.request.on_done()

    def _post(self) -> None:
        """Deliver what the step brought, with one wake-up per event loop."""
        mail, self._mail = self._mail, []
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Event]]] = {}
        for ticket, event in mail:
            if ticket.loop is None:
                ticket.put(event)
            else:
                loops.setdefault(ticket.loop, []).append((ticket, event))
        for loop, letters in loops.items():
            try:
                loop.call_soon_threadsafe(_deliver, letters)
            except RuntimeError:  # the loop is closed: nobody is left to read
                log.debug("%d events came too late for their event loop", len(letters))


def _deliver(letters: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in letters:
        ticket.put(event)


def _complete(command: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        future.set_result(command())
    except Exception as error:
        future.set_exception(error)


def _ends(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """End-of-sequence ids: those of the generation config, else the tokenizer's."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or ())
