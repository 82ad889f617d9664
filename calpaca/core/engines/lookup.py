"""Prompt lookup: guesses of the next tokens, copied from where the last ones occurred before.

An answer that quotes its prompt is guessed well, and one step of the model checks several guesses at once. Guesses never
change an answer: each token is chosen from the model's own logits, and counts only where it is what was guessed.

A step of a few tokens takes no longer than one of a single token (see `schedule`), so so many are guessed wherever even
one token occurred before, and more only of a row whose guesses come true. Of several places, the latest is copied from at
which that token follows which followed most often. Replayed on answers to document QA prompts that gave 2.4 tokens a
step, and 2.2 with the latest place of all, 1.6 with guesses from two tokens on and a pause after wrong ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import cycle, islice

LONGEST = 11
"""Tokens that are guessed at once at most, for a row whose guesses come true."""

SIZES = (3, 2, 1)
"""How many last tokens are looked for, the longer first."""

SURE = 0.75
"""Share of right guesses from which on they come true."""

POOR = 0.05
"""Below this share a single token is too little to guess from."""

_WEIGHT = 0.3  # of the latest step in the moving average


class PromptLookup:
    """What one row guesses, and how well it did."""

    def __init__(self) -> None:
        self.right = 0.5  # moving average of the share of right guesses
        self._ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # where occurrences of some tokens end
        self._indexed = 0

    def draft(self, ids: Sequence[int], free: int, most: int) -> list[int]:
        """Guesses for what follows `ids`: `free` of them, LONGEST of a row that is sure, at most `most`; none where
        nothing like the end of `ids` occurred before."""
        self._index(ids)
        count = min(LONGEST if self.right >= SURE else free, most)
        for size in SIZES if self.right >= POOR else SIZES[:-1]:
            ends = self._ends.get(tuple(ids[len(ids) - size :]))
            if ends is not None:
                begin = _likeliest(ids, ends)
                return list(islice(cycle(ids[begin:]), max(count, 0)))  # past the end, what repeats goes on to
        return []

    def note(self, guessed: int, right: int) -> None:
        """Learn how many guesses of a step were right."""
        self.right += _WEIGHT * (right / guessed - self.right)

    def _index(self, ids: Sequence[int]) -> None:
        """Note where each few tokens end, but for the last, which would only find itself."""
        for end in range(max(self._indexed, 1), len(ids)):
            for size in SIZES:
                if end >= size:
                    self._ends[tuple(ids[end - size : end])].append(end)
        self._indexed = len(ids)


def _likeliest(ids: Sequence[int], ends: Sequence[int]) -> int:
    """The latest of `ends` at which the token stands that stands most often at them."""
    token, _ = Counter(ids[end] for end in ends).most_common(1)[0]
    return next(end for end in reversed(ends) if ids[end] == token)
