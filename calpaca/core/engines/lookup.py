"""Prompt lookup: guesses of the next tokens, copied from where the last ones occurred before.

An answer that quotes its prompt is guessed well, and one step of the model checks several guesses at once. Guesses never
change an answer: each token is chosen from the model's own logits, and counts only where it is what was guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 10
"""Tokens that are guessed at once at most."""

SIZES = (3, 2)
"""How many last tokens are looked for, the longer first."""

POOR = 0.25
"""Below this share of right guesses there are none for a while."""

PAUSE = 16
"""Tokens after which a row that guessed badly tries again; doubles each time."""


class PromptLookup:
    """What one row guesses, and how well it did."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # where the last occurrence of some tokens ends
        self._indexed = 0
        self._length = 4
        self._right = 0.5  # moving average of the share of right guesses
        self._pause = PAUSE
        self._resume = 0  # number of tokens at which guessing goes on

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Guesses for what follows `ids`, at most `most`; none where nothing like their end occurred before."""
        if most < 1 or len(ids) < self._resume:
            return []
        self._index(ids)
        for size in SIZES:
            end = self._ends.get(tuple(ids[len(ids) - size :]))
            if end is not None:
                return list(ids[end : end + min(self._length, most)])
        return []

    def note(self, guessed: int, right: int, tokens: int) -> None:
        """Learn how many guesses of a step were right, when the row has `tokens` tokens."""
        self._right += 0.3 * (right / guessed - self._right)
        self._length = min(LONGEST, guessed + 2) if right == guessed else max(2, right + 1)
        if self._right < POOR:
            self._resume, self._right = tokens + self._pause, POOR
            self._pause *= 2

    def _index(self, ids: Sequence[int]) -> None:
        """Note where each few tokens end, but for the last, which would only find itself."""
        for end in range(max(self._indexed, 1), len(ids)):
            for size in SIZES:
                if end >= size:
                    self._ends[tuple(ids[end - size : end])] = end
        self._indexed = len(ids)
