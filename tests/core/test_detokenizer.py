"""Text that comes token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from calpaca.core.detokenizer import Detokenizer, StopScanner
from calpaca.core.tokenizer import Tokenizer, load_tokenizer

TEXT = "李白（701年—762年），字太白 🦙👩‍👩‍👧 naïve café\n\tdone.  Two  spaces "


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2)


def test_pieces_together_are_the_whole_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) + detokenizer.finish() == TEXT


def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(TEXT)
    pieces = [detokenizer.add(token) for token in ids]
    assert len(ids) > len(TEXT.split())
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_marked(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("🦙")
    assert [detokenizer.add(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.finish().startswith("\ufffd")


def shown(scanner: StopScanner, pieces: list[str]) -> str:
    text = ""
    for piece in pieces:
        text += scanner.add(piece)
        if scanner.matched:
            return text
    return text + scanner.finish()


@pytest.mark.parametrize(
    ("pieces", "expected", "matched"),
    [
        (["abc", "def"], "abcdef", None),
        (["ab", "c#", "##", " Response"], "abc", "### Response"),
        (["ab", "c#", "##", " Rest"], "abc### Rest", None),
        (["x###", " Respons", "e and more"], "x", "### Response"),
        (["one", "END two ### Response"], "one", "END"),
        (["#" * 5, " Response"], "##", "### Response"),
    ],
)
def test_stop_texts_are_cut_and_never_shown(pieces: list[str], expected: str, matched: str | None) -> None:
    scanner = StopScanner(("### Response", "END"))
    assert shown(scanner, pieces) == expected
    assert scanner.matched == matched
