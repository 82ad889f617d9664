"""A pool of texts that tells whether a new one says nearly the same as one that it holds.

Texts that may be alike are found by MinHash signatures in bands (locality-sensitive hashing: Broder 1997, Leskovec et
al., Mining of Massive Datasets, chapter 3) and only those are compared by ROUGE-L. Everything follows from the texts
and their order: a pool that is made again gives the same answers.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calpaca.core.rouge import rouge_l_of_words
from calpaca.core.text_measures import words

THRESHOLD = 0.7
"""Self-Instruct's (Wang et al. 2023): from this ROUGE-L on a text is no new one."""

_BANDS = 42
_ROWS = 3
"""Texts that share three tenths of their shingles meet in one band of 42 at least in two of three cases, those that
share half of them in 996 of 1,000."""
_NEAREST = 48
"""Texts that are compared exactly, those first that meet in most bands."""
_LATEST = 64
"""Texts of a band that are looked at, the latest first: a phrase that begins every text says little."""
_LONGEST = 2_000
"""Words of a text that are compared."""

Likeness = Callable[[Sequence[str], Sequence[str]], bool]
"""Whether two texts, cut into words, say the same, beyond sharing most of them."""

_chance = np.random.default_rng(20_180_101)
_FACTORS = _chance.integers(1, 2**63, _BANDS * _ROWS, dtype=np.uint64) | np.uint64(1)
_SHIFTS = _chance.integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64)
_MIX = _chance.integers(1, 2**63, (_BANDS, _ROWS), dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class Match:
    """The text of the pool, by its number, that a new one is like, and how much (0 to 1)."""

    number: int
    similarity: float


class NearDuplicates:
    """Texts by the order in which they were added. Not thread-safe.

    `says_the_same` has the last word on texts that reach the threshold; left out, these are near-duplicates.
    """

    def __init__(self, threshold: float = THRESHOLD, says_the_same: Likeness | None = None) -> None:
        self.threshold = threshold
        self._says_the_same = says_the_same
        self._words: list[str] = []
        self._letters: dict[str, str] = {}
        self._vocabulary: list[str] = []
        self._latest: dict[int, int] = {}
        self._earlier: list[array[int]] = []

    def __len__(self) -> int:
        return len(self._words)

    def add(self, text: str) -> Match | None:
        """Put a text into the pool, unless it holds one like it already: then say which."""
        letters = self._spelt(words(text)[:_LONGEST])
        bands = _bands(_shingles(letters))
        match = self._nearest(letters, bands)
        if match is None:
            self._keep(letters, bands)
        return match

    def keep(self, text: str) -> None:
        """Put a text into the pool, whatever it holds."""
        letters = self._spelt(words(text)[:_LONGEST])
        self._keep(letters, _bands(_shingles(letters)))

    def find(self, text: str) -> Match | None:
        """The text of the pool that this one is most like, if it is alike at all."""
        letters = self._spelt(words(text)[:_LONGEST])
        return self._nearest(letters, _bands(_shingles(letters)))

    def _spelt(self, tokens: Sequence[str]) -> str:
        """The words as one character each, which are compared faster and take less room."""
        return "".join(self._letters.get(token) or self._new_letter(token) for token in tokens)

    def _new_letter(self, token: str) -> str:
        letter = self._letters[token] = chr(0x20 + len(self._vocabulary) % 0x10_0000)
        self._vocabulary.append(token)
        return letter

    def _read(self, letters: str) -> list[str]:
        return [self._vocabulary[ord(letter) - 0x20] for letter in letters]

    def _keep(self, letters: str, bands: Sequence[int]) -> None:
        number = len(self._words)
        self._words.append(letters)
        self._earlier.append(array("i", (self._latest.get(band, -1) for band in bands)))
        self._latest.update(dict.fromkeys(bands, number))

    def _nearest(self, letters: str, bands: Sequence[int]) -> Match | None:
        best: Match | None = None
        for number, _ in self._meeting(bands).most_common(_NEAREST):
            similarity = rouge_l_of_words(letters, self._words[number])
            if similarity < self.threshold or (best is not None and similarity <= best.similarity):
                continue
            if self._says_the_same is None or self._says_the_same(self._read(letters), self._read(self._words[number])):
                best = Match(number, similarity)
        return best

    def _meeting(self, bands: Sequence[int]) -> Counter[int]:
        """In how many bands the texts of the pool meet this one."""
        meetings: Counter[int] = Counter()
        for place, band in enumerate(bands):
            number = self._latest.get(band, -1)
            for _ in range(_LATEST):
                if number < 0:
                    break
                meetings[number] += 1
                number = self._earlier[number][place]
        return meetings


def _shingles(letters: str) -> NDArray[np.uint64]:
    """Hashes of the words and of the pairs of neighbours: Chinese words are mostly of two characters."""
    ids = np.frombuffer(letters.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    pairs = (ids[:-1] << np.uint64(21)) | ids[1:]
    return np.unique(np.concatenate([pairs, ids + np.uint64(1 << 50)])) * np.uint64(0x9E37_79B9_7F4A_7C15)


def _bands(shingles: NDArray[np.uint64]) -> list[int]:
    """One number for each band of the signature."""
    if not len(shingles):
        return [-1 - band for band in range(_BANDS)]
    hashes = (shingles[:, None] ^ (shingles[:, None] >> np.uint64(29))) * _FACTORS + _SHIFTS
    signature = (hashes >> np.uint64(32)).min(axis=0).reshape(_BANDS, _ROWS)
    mixed = (signature * _MIX).sum(axis=1, dtype=np.uint64) + np.arange(_BANDS, dtype=np.uint64)
    return [int(band) for band in mixed]
