"""How near an answer is to the expected ones: exact match and F1 as reading comprehension is scored.

The texts are made comparable as the scripts of SQuAD 1.1 (Rajpurkar et al. 2016) and MLQA (Lewis et al. 2020) do it:
without case, punctuation and English articles, and with Chinese and Japanese cut into characters, as no spaces part their
words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_IDEOGRAPH = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_IDEOGRAPH}]|[^\s{_IDEOGRAPH}]+")
_ASCII_SYMBOLS = frozenset("$+<=>^`|~")
"""Punctuation for SQuAD's script, symbols for Unicode."""


def words(text: str) -> list[str]:
    """The words of a text without case and punctuation; each Chinese or Japanese character is one."""
    return _TOKEN.findall(_plain(text))


def answer_tokens(text: str) -> list[str]:
    """The words of a text without case, punctuation and articles; each Chinese or Japanese character is one."""
    return _TOKEN.findall(_ARTICLE.sub(" ", _plain(text)))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().translate(_without_punctuation)


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is one of the expected ones."""
    tokens = answer_tokens(answer)
    return any(tokens == answer_tokens(reference) for reference in references)


def contains_answer(answer: str, references: Sequence[str]) -> bool:
    """Whether one of the expected answers stands in the answer, word for word."""
    tokens = answer_tokens(answer)
    return any(_contains(tokens, answer_tokens(reference)) for reference in references)


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the answer's tokens, for the expected answer that it is nearest to."""
    tokens = answer_tokens(answer)
    return max((_f1(tokens, answer_tokens(reference)) for reference in references), default=0.0)


def _f1(tokens: list[str], expected: list[str]) -> float:
    if not tokens or not expected:
        return float(tokens == expected)
    shared = (Counter(tokens) & Counter(expected)).total()
    return 2 * shared / (len(tokens) + len(expected))


def _contains(tokens: list[str], wanted: list[str]) -> bool:
    starts = range(len(tokens) - len(wanted) + 1)
    return bool(wanted) and any(tokens[start : start + len(wanted)] == wanted for start in starts)


def _is_punctuation(character: str) -> bool:
    return character in _ASCII_SYMBOLS or unicodedata.category(character).startswith("P")


class _WithoutPunctuation(dict[int, int | None]):
    """A table for str.translate, which looks each character up once."""

    def __missing__(self, code: int) -> int | None:
        self[code] = kept = None if _is_punctuation(chr(code)) else code
        return kept


_without_punctuation = _WithoutPunctuation()
