"""The coverage ledger: which characters of the source stood in a prompt that the model was sent.

A chunk counts only when its text is found, character by character, in what the token ids of its prompt decode to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calpaca_summarize.partition import Chunk
from calpaca_summarize.source import SourceText


@dataclass(frozen=True)
class PlacedChunk:
    """A chunk of one of the texts, by its number."""

    text: int
    chunk: Chunk

    def of(self, texts: Sequence[SourceText]) -> str:
        """What it says."""
        return texts[self.text].text[self.chunk.start : self.chunk.end]


class CoverageLedger:
    """Counts, for each character, the prompts that it stood in; what a chunk repeats of the one before is not counted."""

    def __init__(self, texts: Sequence[SourceText], chunks: Sequence[PlacedChunk]) -> None:
        self.texts = texts
        self.chunks = chunks
        self._prompts: Counter[int] = Counter()

    def sent(self, chunk: int) -> None:
        """Note a prompt that showed this chunk whole."""
        self._prompts[chunk] += 1

    def of_text(self, text: int) -> float:
        """The share of a text's characters that stood in exactly one prompt."""
        seen = [
            placed.chunk.end - placed.chunk.fresh
            for number, placed in enumerate(self.chunks)
            if placed.text == text and self._prompts[number] == 1
        ]
        return _share(sum(seen), len(self.texts[text].text))

    @property
    def coverage(self) -> float:
        """The same of all texts together."""
        seen = sum(
            placed.chunk.end - placed.chunk.fresh
            for number, placed in enumerate(self.chunks)
            if self._prompts[number] == 1
        )
        return _share(seen, sum(len(each.text) for each in self.texts))

    def by_text(self) -> list[dict[str, Any]]:
        """As `--json` prints it."""
        counts = Counter(placed.text for placed in self.chunks)
        return [
            {"source": each.name, "characters": len(each.text), "chunks": counts[number], "coverage": self.of_text(number)}
            for number, each in enumerate(self.texts)
        ]  # fmt: skip


def _share(seen: int, characters: int) -> float:
    """Rounded down, so that only a whole text has 1.0."""
    return 1.0 if seen == characters else int(seen / characters * 10_000) / 10_000
