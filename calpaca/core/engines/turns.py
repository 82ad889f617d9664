"""Whose turn it is where several adapters share llama.cpp's slots, and which slot a request gets.

In one step llama.cpp runs requests for one adapter only, those in the first slots before all others, so that a request
for another adapter could wait for ever. So requests are handed on in the order in which they come, and one for another
adapter when those before it have ended. A request goes on from what a slot keeps of the same beginning under the same
adapter, never under another one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

SIMILAR = 0.1
"""Share of a prompt that a slot must have, so that it is worth losing what else it keeps."""


@dataclass
class _Slot:
    """What a slot ran last, and when it was given away; `key` is the request that it runs now."""

    number: int
    adapter: str | None = None
    prompt: Sequence[int] = ()
    given: int = 0
    key: int | None = None


class Turns:
    """Requests that wait, and slots. Used by one thread."""

    def __init__(self, slots: int) -> None:
        self._slots = [_Slot(number) for number in range(slots)]
        self._waiting: deque[tuple[int, str | None, Sequence[int]]] = deque()
        self._given = 0

    def add(self, key: int, adapter: str | None, prompt: Sequence[int]) -> None:
        """Put a request behind the others."""
        self._waiting.append((key, adapter, prompt))

    def remove(self, key: int) -> bool:
        """Take a request out; False where it does not wait any more."""
        kept = deque(each for each in self._waiting if each[0] != key)
        found = len(kept) < len(self._waiting)
        self._waiting = kept
        return found

    def next(self) -> tuple[int, int] | None:
        """The next request and the number of its slot; None where it has to wait."""
        free = [slot for slot in self._slots if slot.key is None]
        if not self._waiting or not free:
            return None
        key, adapter, prompt = self._waiting[0]
        if any(slot.key is not None and slot.adapter != adapter for slot in self._slots):
            return None
        self._waiting.popleft()
        slot = max(free, key=lambda each: (_known(each, adapter, prompt), -each.given))
        self._given += 1
        slot.key, slot.adapter, slot.prompt, slot.given = key, adapter, prompt, self._given
        return key, slot.number

    def end(self, key: int) -> None:
        """Free the slot of a request."""
        for slot in self._slots:
            if slot.key == key:
                slot.key = None


def _known(slot: _Slot, adapter: str | None, prompt: Sequence[int]) -> int:
    """How many tokens of a prompt a slot has already; 0 for a few."""
    if slot.adapter != adapter:
        return 0
    pairs = enumerate(zip(slot.prompt, prompt, strict=False))
    shared = next((at for at, (own, other) in pairs if own != other), min(len(slot.prompt), len(prompt)))
    return shared if shared >= SIMILAR * len(prompt) else 0
