"""Keys and values of the rows under way: each row has a slot to itself for as long as it runs.

Slots of one capacity lie together on a shelf, so that rows of like length share one attention call and a long row does
not make short ones longer. Rows come and go without a copy; only when many slots stand empty do some move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calpaca.core.errors import ModelError
from calpaca.core.memory import values_per_token
from calpaca.core.weights import free_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from calpaca.core.weights import LoadedWeights

SMALLEST = 512
"""Tokens that fit into a slot of the smallest capacity; each further one is four times as large."""

KEPT_FREE = 512 << 20
"""Bytes of memory that are left to others."""


@dataclass(eq=False)
class Place:
    """A row's slot: `tokens` may be written to it, `filled` of them are."""

    shelf: Shelf
    slot: int
    tokens: int
    filled: int = 0


class Shelf:
    """Slots of one capacity: for each layer keys and values [slots, key-value heads, capacity, dimensions].

    A layer is laid out when its first keys arrive, since their shape is the model's affair.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.places: list[Place | None] = []
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def growth(self) -> int:
        """How many slots are laid out when the next one is taken."""
        return 0 if None in self.places else max(1, len(self.places))

    def take(self, tokens: int) -> Place:
        """The first free slot; their number doubles when none is."""
        if self.growth:
            self._grow(len(self.places) + self.growth)
        place = Place(self, self.places.index(None), tokens)
        self.places[place.slot] = place
        return place

    def release(self, place: Place) -> None:
        self.places[place.slot] = None
        used = [place for place in self.places if place is not None]
        if not used:
            self.places, self.layers = [], {}
            return
        highest = max(used, key=lambda place: place.slot)
        if 2 * len(used) <= highest.slot:  # more than half would be computed for nothing
            self._move(highest, self.places.index(None))

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer; those given, [tokens, heads, dimensions], show its shape the first time."""
        if index not in self.layers:
            self.layers[index] = (self._empty(keys), self._empty(values))
        return self.layers[index]

    def read(self, place: Place, begin: int, end: int) -> Tensor | None:
        """Keys and values of some tokens, [2 × layers, heads, tokens, dimensions]; None where layers are not alike."""
        import torch

        if list(self.layers) != list(range(len(self.layers))):
            return None
        states = [states[place.slot, :, begin:end] for layer in self.layers.values() for states in layer]
        return torch.stack(states) if len({part.shape for part in states}) == 1 else None

    def write(self, place: Place, states: Tensor) -> None:
        """Fill the beginning of a slot with what `read` gave."""
        for index in range(len(states) // 2):
            pair = states[2 * index], states[2 * index + 1]
            layer = self.layer(index, *(part.transpose(0, 1) for part in pair))
            for own, part in zip(layer, pair, strict=True):
                own[place.slot, :, : part.shape[1]] = part

    def _empty(self, like: Tensor, slots: int = 0) -> Tensor:
        shape = (slots or len(self.places), like.shape[1], self.capacity, like.shape[-1])
        return zeros(shape, like.dtype, like.device)

    def _grow(self, slots: int) -> None:
        longest = max((place.filled for place in self.places if place is not None), default=0)
        for index, (keys, values) in self.layers.items():
            grown = []
            for states in (keys, values):
                new = self._empty(states, slots)
                new[: len(states), :, :longest] = states[:, :, :longest]
                grown.append(new)
            self.layers[index] = (grown[0], grown[1])
        self.places += [None] * (slots - len(self.places))

    def _move(self, place: Place, slot: int) -> None:
        for layer in self.layers.values():
            for states in layer:
                states[slot, :, : place.filled] = states[place.slot, :, : place.filled]
        self.places[place.slot], self.places[slot] = None, place
        place.slot = slot


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; on a CPU its pages take memory only once something is written to them.

    Attention reads past the end of shorter rows: what is there must be finite, since its weight, 0, is multiplied.
    """
    import math

    import numpy as np
    import torch

    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)


class SlotCache:
    """The shelves of a model, within the memory that is free."""

    def __init__(self, weights: LoadedWeights) -> None:
        model = weights.model
        self._context_length = weights.context_length
        self._device = model.device
        values = values_per_token(model.config.get_text_config().to_dict())
        self._token_bytes: int = (values or 0) * model.dtype.itemsize  # in all layers together
        self.shelves: dict[int, Shelf] = {}

    @property
    def free_memory(self) -> int:
        """Bytes that can still be had on the device; what torch keeps for itself counts as free."""
        import torch

        if self._device.type != "cuda":
            return free_memory()
        unused: int = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free: int = torch.cuda.mem_get_info(self._device)[0]
        return free + unused

    def missing(self, tokens: int) -> int:
        """Bytes that would have to be freed before a row that gets as long as `tokens` can have a slot."""
        needed = self._promised(tokens) if self._device.type == "cpu" else self._laid_out(tokens)
        return needed * self._token_bytes - (self.free_memory - KEPT_FREE)

    def _promised(self, tokens: int) -> int:
        """Tokens that are still to be written: on a CPU only those take memory."""
        return tokens + sum(place.tokens - place.filled for place in self._running())

    def _laid_out(self, tokens: int) -> int:
        """Tokens that there is room to be made for at once: elsewhere a slot takes all of its memory from the start, and
        while a layer moves to more slots its old ones are there too."""
        capacity = self._capacity(tokens)
        shelf = self.shelves.get(capacity, Shelf(capacity))
        coming = sum(len(each.places) * each.capacity for each in self.shelves.values() if not each.layers)
        copied = len(shelf.places) / len(shelf.layers) if shelf.growth and shelf.layers else 0
        return coming + int((shelf.growth + copied) * capacity)

    def take(self, tokens: int) -> Place | None:
        """A slot for a row that gets as long as `tokens`; None while the rows under way need the memory.

        Raises ModelError when there is not enough even without them.
        """
        if self.missing(tokens) > 0:
            if self._running():
                return None
            raise ModelError(
                f"{tokens} tokens of context take {tokens * self._token_bytes >> 20} MiB of memory,"
                f" {self.missing(tokens) >> 20} MiB more than there are.",
                "Ask for fewer tokens with --max-new-tokens, use --dtype bfloat16, or close other programs.",
            )
        capacity = self._capacity(tokens)
        return self.shelves.setdefault(capacity, Shelf(capacity)).take(tokens)

    def _running(self) -> list[Place]:
        return [place for shelf in self.shelves.values() for place in shelf.places if place is not None]

    def _capacity(self, tokens: int) -> int:
        capacity = SMALLEST
        while capacity < tokens:
            capacity *= 4
        return min(capacity, self._context_length)

    def clear(self) -> None:
        self.shelves.clear()
