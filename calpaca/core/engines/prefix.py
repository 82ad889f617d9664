"""Keys and values of earlier prompts and answers, kept in blocks for requests that begin the same way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from calpaca.core.engines.slots import Place

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
"""Tokens of a block. Only whole blocks are kept."""

MOST_BYTES = 2 << 30
"""The cache takes at most this, and never more than a quarter of what is free."""

Key = tuple[int, tuple[int, ...]]
"""A block's name: the number of the block before it (of the adapter, for the first), and its own tokens. Two blocks of
the same tokens behind different ones are different blocks."""


@dataclass(frozen=True)
class _Block:
    """states [2 × layers, key-value heads, BLOCK, dimensions]: keys and values of each layer in turn."""

    number: int
    states: Tensor


class PrefixCache:
    """Blocks by content, the least recently used dropped first. Used by one thread."""

    def __init__(self, free_memory: Callable[[], int]) -> None:
        self._free_memory = free_memory
        self._blocks: OrderedDict[Key, _Block] = OrderedDict()
        self._numbers = count(1 << 32)  # below are the adapters'
        self.bytes = 0

    def restore(self, ids: Sequence[int], adapter: int, place: Place) -> int:
        """Fill an empty slot with the longest known beginning of `ids`, at least one token less than all of them.

        Returns how many tokens that are.
        """
        import torch

        found = list(self._chain(ids[: len(ids) - 1], adapter))
        if not found:
            return 0
        self._touch(found)
        states = torch.cat([self._blocks[key].states for key in found], dim=2)
        place.filled = states.shape[2]
        place.shelf.write(place, states)
        return place.filled

    def keep(self, ids: Sequence[int], adapter: int, place: Place) -> None:
        """Take in the whole blocks of a slot that holds keys and values of the beginning of `ids`."""
        import torch

        whole = place.filled // BLOCK
        known = list(self._chain(ids[: place.filled], adapter))
        if len(known) < whole:
            states = place.shelf.read(place, len(known) * BLOCK, whole * BLOCK)
            if states is None:
                return
            parent = self._blocks[known[-1]].number if known else adapter
            for begin, part in zip(range(len(known), whole), torch.split(states, BLOCK, dim=2), strict=True):
                key = (parent, tuple(ids[begin * BLOCK : (begin + 1) * BLOCK]))
                block = _Block(next(self._numbers), part.clone())
                self._blocks[key] = block
                self.bytes += part.nbytes
                known.append(key)
                parent = block.number
        self._touch(known)
        self.shrink(min(MOST_BYTES, (self._free_memory() + self.bytes) // 4))

    def shrink(self, limit: int) -> None:
        """Drop blocks until they take no more than `limit` bytes."""
        while self._blocks and self.bytes > limit:
            _, block = self._blocks.popitem(last=False)
            self.bytes -= block.states.nbytes

    def clear(self) -> None:
        self.shrink(-1)

    def _chain(self, ids: Sequence[int], adapter: int) -> Iterator[Key]:
        """The keys of the known blocks that `ids` begin with."""
        parent = adapter
        for begin in range(0, len(ids) - BLOCK + 1, BLOCK):
            key = (parent, tuple(ids[begin : begin + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                return
            yield key
            parent = block.number

    def _touch(self, chain: Sequence[Key]) -> None:
        """Mark blocks as just used, a block after those that follow it, since without it they cannot be found."""
        for key in reversed(chain):
            self._blocks.move_to_end(key)
