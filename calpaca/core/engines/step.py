"""One forward pass: the tokens that run in it, laid end to end, and their attention to what each row keeps.

Tokens of different rows, prompts and answers alike, share every matrix product without padding; only attention looks at
them row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from calpaca.core.engines.slots import Place, Shelf

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calpaca.core.engines.row import Row


@dataclass(frozen=True)
class Span:
    """Tokens of one row that follow what its slot holds; the last `outputs` of them give logits.

    Of these logits, the first `scored` belong to tokens of the prompt whose log probabilities are wanted, and the others
    to the next token and to those after each of the `guesses` at the end of `tokens`.
    """

    row: Row
    tokens: Sequence[int]
    outputs: int
    scored: int = 0
    guesses: int = 0

    @property
    def chooses(self) -> bool:
        """Whether the row's next token follows from this span."""
        return self.outputs > self.scored

    @property
    def place(self) -> Place:
        assert self.row.place is not None
        return self.row.place


class Step:
    """The tokens of a forward pass: `ids` and `positions` [tokens], `outputs`, the indices of those that give logits.

    `spans` are in the order in which their tokens lie. Where they have fewer than `least` tokens, or logits, others are
    added at the end, of which nothing is kept.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device, least: int = 1) -> None:
        import torch

        self.spans = sorted(spans, key=_order)
        ids: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        for span in self.spans:
            ids += span.tokens
            positions += range(span.place.filled, span.place.filled + len(span.tokens))
            outputs += range(len(ids) - span.outputs, len(ids))
        self.tokens = len(ids)
        self._added = max(least - len(ids), 0)
        ids += [0] * self._added
        positions += [0] * self._added
        outputs += outputs[-1:] * (least - len(outputs))
        self.ids = torch.tensor(ids, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.outputs = torch.tensor(outputs, dtype=torch.long, device=device)
        self._sections: list[_Section] = []
        begin = 0
        for shelf, members in groupby(self.spans, key=lambda span: span.place.shelf):
            section = _Section(shelf, list(members), begin, self.positions)
            self._sections.append(section)
            begin = section.end

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Store new keys and values [tokens, key-value heads, dimensions] and attend to all that each row has.

        queries [tokens, heads, dimensions]; `window` is how many tokens back a token sees. Returns [tokens, heads,
        dimensions].
        """
        import torch

        parts = [
            part
            for section in self._sections
            for part in section.attend(layer, queries, keys, values, scale=scale, window=window)
        ]  # fmt: skip
        if self._added:
            parts.append(queries.new_zeros(self._added, *queries.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def finish(self) -> None:
        """Count the tokens as kept, once all layers have seen them."""
        for span in self.spans:
            span.place.filled += len(span.tokens)


def _order(span: Span) -> tuple[int, bool, int]:
    """By shelf; single tokens first, in the order of their slots."""
    return span.place.shelf.capacity, len(span.tokens) > 1, span.place.slot


class _Section:
    """The tokens of a step whose rows are on one shelf."""

    def __init__(self, shelf: Shelf, spans: Sequence[Span], begin: int, positions: Tensor) -> None:
        import torch

        self._shelf = shelf
        self._begin = begin
        slots = [span.place.slot for span in spans for _ in span.tokens]
        self.end = begin + len(slots)
        self._slots = torch.tensor(slots, device=positions.device)
        self._positions = positions[begin : self.end]
        self._index: dict[int, Tensor] = {}  # by number of heads
        single = [span for span in spans if len(span.tokens) == 1]
        groups = ([single] if single else []) + [[span] for span in spans[len(single) :]]
        self._blocks = []
        for group in groups:
            self._blocks.append(_Block(group, begin, positions))
            begin = self._blocks[-1].end

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float | None, window: int | None
    ) -> list[Tensor]:
        own_keys, own_values = self._shelf.layer(layer, keys, values)
        heads = keys.shape[1]
        if heads not in self._index:
            self._index[heads] = self._flat_index(heads)
        for own, new in ((own_keys, keys), (own_values, values)):
            rows = new[self._begin : self.end].reshape(-1, new.shape[-1])
            own.view(-1, new.shape[-1]).index_copy_(0, self._index[heads], rows)
        return [block.attend(queries, own_keys, own_values, scale=scale, window=window) for block in self._blocks]

    def _flat_index(self, heads: int) -> Tensor:
        """Where the tokens go in [slots × heads × capacity, dimensions]."""
        import torch

        first = self._slots[:, None] * heads + torch.arange(heads, device=self._slots.device)
        return (first * self._shelf.capacity + self._positions[:, None]).flatten()


class _Block:
    """Spans of one length on one shelf that share an attention call: one token each of many rows, or many of one."""

    def __init__(self, spans: Sequence[Span], begin: int, positions: Tensor) -> None:
        import torch

        self._count, self._length = len(spans), len(spans[0].tokens)
        self._begin, self.end = begin, begin + self._count * self._length
        slots = [span.place.slot for span in spans]
        self._first, self._last = slots[0], slots[-1] + 1
        self._reach = max(span.place.filled for span in spans) + self._length
        self._positions = positions[self._begin : self.end].view(self._count, self._length)
        self._rows: Tensor | None = None
        if self._last - self._first > self._count:  # empty slots in between are computed too, and left out
            self._rows = torch.tensor(slots, device=positions.device) - self._first
            spread = positions.new_zeros(self._last - self._first, self._length)
            self._positions = spread.index_copy_(0, self._rows, self._positions)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float | None, window: int | None
    ) -> Tensor:
        """[tokens, heads, dimensions] for this block's queries among all [tokens, heads, dimensions]."""
        import torch

        kv_heads = keys.shape[1]
        own = queries[self._begin : self.end].view(self._count, self._length, *queries.shape[1:])
        if self._rows is not None:
            own = own.new_zeros(self._last - self._first, *own.shape[1:]).index_copy_(0, self._rows, own)
        group = own.shape[2] // kv_heads
        # Query heads that share a key head stand as further queries of it, so that keys are never repeated.
        folded = own.view(*own.shape[:2], kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        if (group, window) not in self._masks:
            self._masks[group, window] = self._mask(group, window, queries.dtype)
        attended: Tensor = torch.nn.functional.scaled_dot_product_attention(
            folded,
            keys[self._first : self._last, :, : self._reach],
            values[self._first : self._last, :, : self._reach],
            attn_mask=self._masks[group, window],
            scale=scale,
        )
        attended = attended.view(len(own), kv_heads, group, self._length, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)
        if self._rows is not None:
            attended = attended[self._rows]
        return attended.flatten(0, 1)

    def _mask(self, group: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[rows, 1, group × length, reach], added to the scores: 0 where a token sees another, else -inf."""
        import torch

        if len(self._positions) == self._length == 1 and (window is None or self._reach <= window):
            return None
        positions = self._positions[:, :, None]
        columns = torch.arange(self._reach, device=positions.device)
        hidden = columns > positions
        if window is not None:
            hidden |= columns <= positions - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
        return mask.repeat(1, group, 1)[:, None]
