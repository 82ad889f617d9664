"""Quotations found again in a text, however its line ends, widths and punctuation differ.

Both sides are *folded*: Unicode's compatibility form without case, white space and punctuation, so that `１９７６年，` is
`1976年` and a word that a PDF broke at a line end is whole. Only between two digits the separator stays (`3.5` is not
`35`), except the comma of thousands. Each folded character remembers where it came from, so that what was found is a
slice of the text itself.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class FoldedText:
    """A text and its folded form."""

    text: str

    @cached_property
    def _pairs(self) -> list[tuple[str, int]]:
        return list(_fold(self.text))

    @cached_property
    def folded(self) -> str:
        return "".join(character for character, _ in self._pairs)

    @cached_property
    def _origins(self) -> list[int]:
        return [place for _, place in self._pairs]

    def find(self, quote: str) -> tuple[int, int] | None:
        """Where a quote stands: (start, end) with `text[start:end]` the words themselves. None where it does not.

        It begins and ends with whole words: `cat` does not stand in `concatenate`.
        """
        wanted = FoldedText(quote).folded
        start = self.folded.find(wanted) if wanted else -1
        while start >= 0:
            first, last = self._origins[start], self._origins[start + len(wanted) - 1]
            if not _cuts_word(self.text, first) and not _cuts_word(self.text, last + 1):
                return first, last + 1
            start = self.folded.find(wanted, start + 1)
        return None


def _fold(text: str) -> list[tuple[str, int]]:
    """Folded characters with the place each came from."""
    found: list[tuple[str, int]] = []
    gap = ""  # what was left out since the last character that was kept
    for place, original in enumerate(text):
        for character in unicodedata.normalize("NFKC", original).casefold():
            if not _counts(character):
                gap += character
                continue
            if gap and character.isdigit() and found and found[-1][0].isdigit():
                found += [(each, place - 1) for each in _kept(gap)]
            found.append((character, place))
            gap = ""
    return found


def _counts(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNM" or character in "%‰°$€£¥+<>="


def _kept(gap: str) -> str:
    """What stays of the characters between two digits."""
    marks = "".join(gap.split())
    return marks if marks and marks != "," else " " * (not marks)


def _cuts_word(text: str, place: int) -> bool:
    """Whether a cut at `place` parts letters or digits that belong together; Chinese is cut anywhere."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    return _in_word(before) and _in_word(after) and before.isdigit() == after.isdigit()


def _in_word(character: str) -> bool:
    return character.isalnum() and not _is_ideograph(character)


def _is_ideograph(character: str) -> bool:
    return "\u3040" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff"
