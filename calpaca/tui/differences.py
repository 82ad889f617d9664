"""Where answers differ, word by word: marked by type, so that it can be seen without colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from rich.text import Text

_PIECES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|\s+|[^\w\s]")
_MARK = "bold underline"


def marked(texts: Sequence[str]) -> list[Text]:
    """The texts; what the first and another do not share is underlined in both."""
    pieces = [_PIECES.findall(text) for text in texts]
    own: list[set[int]] = [set() for _ in texts]
    for place in range(1, len(texts)):
        matcher = SequenceMatcher(None, pieces[0], pieces[place], autojunk=False)
        for kind, first, first_end, other, other_end in matcher.get_opcodes():
            if kind != "equal":
                own[0].update(range(first, first_end))
                own[place].update(range(other, other_end))
    return [_styled(words, places) for words, places in zip(pieces, own, strict=True)]


def _styled(words: Sequence[str], places: set[int]) -> Text:
    text = Text()
    for place, word in enumerate(words):
        text.append(word, _MARK if place in places and not word.isspace() else "")
    return text
