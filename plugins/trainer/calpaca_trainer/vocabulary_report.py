"""How well a vocabulary writes given texts: tokens per character, and whether the texts come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calpaca_trainer.vocabulary import read_pieces


@dataclass(frozen=True)
class Measure:
    """One vocabulary on one text. `difference` is the first character that does not come back, None where all do."""

    vocabulary: str
    pieces: int
    text: str
    characters: int
    tokens: int
    difference: int | None

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / self.characters if self.characters else 0.0


def measure(models: Sequence[Path], texts: Sequence[Path]) -> list[Measure]:
    """Every vocabulary on every text. Raises what `read_pieces` raises."""
    from sentencepiece import SentencePieceProcessor

    read = {text: text.read_text("utf-8") for text in texts}
    found = []
    for model in models:
        processor = SentencePieceProcessor(model_proto=read_pieces(model).SerializeToString())
        for text, content in read.items():
            ids = processor.encode(content)
            back = processor.decode(ids)
            found.append(
                Measure(str(model), len(processor), str(text), len(content), len(ids), _first_difference(content, back))
            )
    return found


def _first_difference(text: str, back: str) -> int | None:
    if text == back:
        return None
    pairs = enumerate(zip(text, back, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(text), len(back)))
