"""What a sentence says as far as strings tell: its content words, its numbers, and its Chinese characters in pairs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from calpaca_retrieval_qa.evidence import Words, content_words

_NUMBER = re.compile(r"\d+(?:[.,:/-]\d+)*")
_HAN_RUN = re.compile(r"[\u3400-\u9fff]+")
_HAN_NUMERALS = frozenset("零〇一二三四五六七八九十百千万亿两半")
_HAN_EMPTY = frozenset("的了是在有和与及也都就而但为由于以之其这那个位它他她们着过被把对从到吗呢吧啊所并或")


_NAME = re.compile(r"(?<=[^\s.!?:“\"(]\s)[A-Z][^\W_]+")
"""A word with a capital that begins no sentence."""
_FILLERS = frozenset(
    ["them", "yes", "so", "therefore", "however", "thus", "such", "then", "both", "each", "very", "just"]
)


@dataclass(frozen=True)
class Fact:
    """Something a text says: it is said elsewhere too where one of `forms` stands.

    Of numbers and names, which are `exact`, none may be missing where a text is to say the same.
    """

    forms: frozenset[str]
    exact: bool = False


class Statements:
    """A text that is asked which facts it holds."""

    def __init__(self, text: str) -> None:
        plain = unicodedata.normalize("NFKC", text)
        self._words = Words(plain)
        self._unbroken = "".join(plain.split())
        self._numbers = _numbers(plain)

    def __contains__(self, fact: Fact) -> bool:
        return any(self._holds(form) for form in fact.forms)

    def _holds(self, form: str) -> bool:
        if _NUMBER.fullmatch(form):
            return form in self._numbers
        return form in (self._unbroken if _HAN_RUN.match(form) else self._words)

    def held(self, facts: Iterable[Fact]) -> set[Fact]:
        """Those of `facts` that stand here."""
        return {fact for fact in facts if fact in self}


def facts(text: str) -> set[Fact]:
    """All facts of a text."""
    plain = unicodedata.normalize("NFKC", text)
    names = content_words(" ".join(_NAME.findall(plain)))
    words = {word for word in content_words(plain) if not word[0].isdigit() and not _HAN_RUN.match(word)} - _FILLERS
    found = {Fact(frozenset([word]), exact=word in names) for word in words}
    found |= {Fact(frozenset([number]), exact=True) for number in _numbers(plain)}
    for run in _HAN_RUN.findall("".join(plain.split())):
        found |= set(_characters(run))
    return found


def _numbers(text: str) -> set[str]:
    return {number.replace(",", "") for number in _NUMBER.findall(text)}


def _characters(run: str) -> Iterable[Fact]:
    """A fact for each character: it is held where it stands beside one of its neighbours."""
    for place, character in enumerate(run):
        if character not in _HAN_EMPTY:
            pairs = [run[start : start + 2] for start in (place - 1, place) if start >= 0 and start + 2 <= len(run)]
            yield Fact(frozenset(pairs or [character]), exact=character in _HAN_NUMERALS)
