"""One running request, as the engine keeps it."""

from dataclasses import dataclass
from typing import Any

from orchestrator.serve.request import Ticket
from orchestrator.serve.sampling import Detokenizer, Draw


@dataclass(slots=True, eq=False)
class Row:
    """One running request; a token's place in ``tokens`` is its position."""

    ticket: Ticket
    order: int
    """How many were admitted before it."""
    index: int
    """Its row of the cache."""
    tokens: list[int]
    """Placeholders for its delta's prefix and virtual tokens, the prompt, the answer so far."""
    prompted: int
    """How many of these are not the answer."""
    prefix: int
    """How many of these are only keys and values, and are never read."""
    cached: int
    """How many of these have their keys and values in the cache."""
    draw: Draw
    text: Detokenizer

    @classmethod
    def of(cls, ticket: Ticket, order: int, index: int, lead: tuple[int, int], tokenizer: Any) -> "Row":
        """A row that has read nothing yet; ``lead`` is its delta's virtual tokens and length of prefix."""
        request, (virtual, prefix) = ticket.request, lead
        tokens = [0] * (prefix + virtual) + list(request.prompt)  # the delta gives what stands for any placeholder
        text = Detokenizer(tokenizer, request.prompt, request.sampling.stop)
        return cls(ticket, order, index, tokens, len(tokens), prefix, prefix, Draw(request.sampling), text)

    @property
    def left(self) -> int:
        """Prompt tokens not read yet, virtual ones included; 0 while decoding."""
        return max(0, self.prompted - self.cached)
