"""Keys and values of every running request in one block per layer, and the masks that keep them apart.

Shapes: R rows held, B rows of one forward, T new tokens of each, L length, H heads, D size of a head.
A row of the block belongs to one request. Rows 0..d-1 are the decoding ones, kept dense, so that a decode step
reads a view and copies nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from orchestrator.base.attention import NAME
from orchestrator.errors import ServeError

_STEP = 128  # the block grows in lengths of this many tokens, and doubles from there


@dataclass(frozen=True, slots=True)
class Window:
    """Which part of the block one forward writes and reads; N = its real (unpadded) tokens."""

    rows_B: Tensor
    """Row of each line of the batch."""
    row_N: Tensor
    """Row each real token is written to."""
    place_N: Tensor
    """Position each real token is written to."""
    take_N: Tensor | None
    """Which of the flattened B x T tokens are real; None where all are."""
    rows: int
    """Rows that the block must have."""
    start: int | None
    """First row where the rows are consecutive, so that a view will do; else None."""
    length: int
    """Keys that are read: the longest row of the batch."""


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's block, [R, H, L, D]; made on the first write, when head count and size are known."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty blocks of the right head count, size, type and device."""
        # Zeros, not whatever memory holds: a masked NaN still spoils a sum.
        self.keys = key_states.new_zeros((0, key_states.shape[1], 0, key_states.shape[3]))
        self.values = value_states.new_zeros((0, value_states.shape[1], 0, value_states.shape[3]))
        self.is_initialized = True

    def grow(self, rows: int, length: int) -> None:
        """Make room for at least ``rows`` rows of ``length`` tokens."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            if old.shape[0] < rows or old.shape[2] < length:
                new = old.new_zeros((max(rows, old.shape[0]), old.shape[1], max(length, old.shape[2]), old.shape[3]))
                new[: old.shape[0], :, : old.shape[2]] = old
                setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Unused: ``SlotCache.update`` writes."""
        raise NotImplementedError

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: masks are given to the model ready-made."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Positions are given to the model, so what the cache would guess is never read."""
        return 0

    def get_max_length(self) -> int:
        """No maximum of its own."""
        return -1


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Rows of keys and values, addressed by the ``Window`` of the forward that is running."""

    def __init__(self, rows: int, length: int) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
        self._most_rows, self._most_length = rows, length
        self.window: Window | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._made)

    @property
    def _made(self) -> list[_Layer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Write the new tokens' keys and values [B, H, T, D]; return those of the whole rows [B, H, length, D]."""
        window = self.window
        if window is None:
            raise ServeError("a cache without a window was written to")
        layer = self._layer(layer_idx, key_states, value_states, window.rows, window.length)
        for block, new in ((layer.keys, key_states), (layer.values, value_states)):
            flat_NHD = new.transpose(1, 2).flatten(0, 1)
            block[window.row_N, :, window.place_N] = flat_NHD if window.take_N is None else flat_NHD[window.take_N]
        if window.start is not None:
            span = slice(window.start, window.start + len(window.rows_B))
            return layer.keys[span, :, : window.length], layer.values[span, :, : window.length]
        return layer.keys[window.rows_B, :, : window.length], layer.values[window.rows_B, :, : window.length]

    def put(self, row: int, prefix: Mapping[int, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        """Write a prefix, each layer's keys and values [H, P, D], to the first places of a row."""
        for layer_idx, (key_HPD, value_HPD) in prefix.items():
            key_HPD, value_HPD = key_HPD.to(dtype), value_HPD.to(dtype)
            length = key_HPD.shape[1]
            layer = self._layer(layer_idx, key_HPD.unsqueeze(0), value_HPD.unsqueeze(0), row + 1, length)
            layer.keys[row, :, :length], layer.values[row, :, :length] = key_HPD, value_HPD

    def _layer(self, layer_idx: int, key_states: Tensor, value_states: Tensor, rows: int, length: int) -> _Layer:
        """A layer with room for ``rows`` rows of ``length`` tokens."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer())
        layer: _Layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        have_rows, have_length = layer.keys.shape[0], layer.keys.shape[2]
        if rows > have_rows:
            rows = min(self._most_rows, max(rows, 2 * have_rows, 4))
        if length > have_length:
            length = min(self._most_length, max(-(-length // _STEP) * _STEP, 2 * have_length))
        layer.grow(rows, length)
        return layer

    def move(self, source: int, target: int, length: int) -> None:
        """Move the first ``length`` tokens of row ``source`` to row ``target``."""
        if not length:  # nothing of it is read yet, and the block may not reach that far
            return
        for layer in self._made:
            for block in (layer.keys, layer.values):
                block[target, :, :length] = block[source, :, :length]
        self.wipe(source, length)

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` tokens of two rows."""
        for layer in self._made:
            for block in (layer.keys, layer.values):
                kept = block[one, :, :length].clone()
                block[one, :, :length] = block[other, :, :length]
                block[other, :, :length] = kept

    def wipe(self, row: int, length: int) -> None:
        """Zero the first ``length`` tokens of a row, so that nothing of it reaches the row's next owner."""
        for layer in self._made:
            if row < layer.keys.shape[0]:
                layer.keys[row, :, :length] = 0
                layer.values[row, :, :length] = 0


class Masks:
    """Builds the explicit 4-D attention masks of a model; raises ``ServeError`` for a model it cannot serve."""

    def __init__(self, model: nn.Module) -> None:
        config = model.config.get_text_config()  # type: ignore[operator,union-attr]
        self._additive = config._attn_implementation == "eager"
        if config._attn_implementation not in ("eager", "sdpa", NAME):
            raise ServeError(
                f"attention '{config._attn_implementation}' takes no explicit mask; serve with base.attention=sdpa"
            )
        sliding = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if strange := kinds - {"full_attention", "sliding_attention"}:
            raise ServeError(f"layers of type {', '.join(sorted(strange))} cannot be served; only attention layers can")
        self._windows: dict[str, int | None] = {"full_attention": None, "sliding_attention": sliding}
        # A model without layer types, such as Mistral, has its window in every layer.
        self._kinds = sorted(kinds) or ["sliding_attention" if sliding else "full_attention"]
        self.dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)

    def __call__(self, position_BT: Tensor, length: int, prefix: Sequence[int]) -> Tensor | dict[str, Tensor]:
        """The mask [B, 1, T, length] for queries at these positions; one per kind where the layers differ.

        The first ``prefix[b]`` keys of a row are seen by all its queries, however far.
        """
        key_L = torch.arange(length, device=position_BT.device)
        query_BT1 = position_BT.unsqueeze(-1)
        masks: dict[str, Tensor] = {}
        for kind in self._kinds:
            seen_BTL = key_L <= query_BT1
            if (window := self._windows[kind]) is not None:
                near_BTL = key_L > query_BT1 - window
                if any(prefix):
                    near_BTL = near_BTL | (key_L < torch.tensor(prefix, device=key_L.device).view(-1, 1, 1))
                seen_BTL = seen_BTL & near_BTL
            mask = seen_BTL.unsqueeze(1)
            if self._additive:
                low = torch.finfo(self.dtype).min
                mask = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill(~mask, low)
            masks[kind] = mask
        return masks if len(masks) > 1 else next(iter(masks.values()))


def window(rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Window:
    """The window of a forward that adds ``counts[b]`` tokens to row ``rows[b]`` from position ``starts[b]``."""
    longest = max(counts)
    row_N = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    place_N = [start + t for start, count in zip(starts, counts, strict=True) for t in range(count)]
    take = None
    if min(counts) < longest:
        take = [line * longest + t for line, count in enumerate(counts) for t in range(count)]
    consecutive = all(row == rows[0] + line for line, row in enumerate(rows))
    return Window(
        rows_B=torch.tensor(list(rows), device=device),
        row_N=torch.tensor(row_N, device=device),
        place_N=torch.tensor(place_N, device=device),
        take_N=None if take is None else torch.tensor(take, device=device),
        rows=max(rows) + 1,
        start=rows[0] if consecutive else None,
        length=max(start + count for start, count in zip(starts, counts, strict=True)),
    )
