"""What keeps a row out: one reason for each, in the order in which they are looked for. They hold for Chinese too."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from calpaca.core.language import Language, language_of
from calpaca.core.near_duplicates import NearDuplicates
from calpaca.core.rouge import rouge_l_of_words
from calpaca.core.text_measures import words
from calpaca_crawl.row import Row
from calpaca_crawl.wording import same_content

_REFUSAL = re.compile(
    r"as an? (?:ai|artificial)\b|as a (?:large )?language model|i(?:'m| am) (?:sorry|unable)|i can(?:no|')t (?:help|assist|provide)|"
    r"(?:作为|身为)(?:一[个名])?(?:ai|人工智能|语言模型|大?模型)|(?:很抱歉|对不起|抱歉)[,,，]?我?(?:无法|不能|没有办法)|我(?:无法|不能)(?:回答|提供|完成)",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"\[(?:insert|your|name|placeholder|input|text|topic|date)\b[^\]]{0,40}\]|<(?:input|output|instruction|noinput|placeholder|text)>|"
    r"\{\{?\s*\w+\s*\}?\}|lorem ipsum|\bx{3,}\b|[\[【<((](?:此处|在此|请)?(?:插入|填写|填入|输入)[^\]】>))]{0,20}[\]】>))]|某某|×{2,}|[xX]{2,}(?:公司|先生|女士)|待填写|^…|…$",
    re.IGNORECASE | re.MULTILINE,
)
_REPEATED = re.compile(r"(.{1,60}?)\1{5,}", re.DOTALL)
_UNREADABLE = "\ufffd"


@dataclass(frozen=True)
class Limits:
    """How long questions and answers may be, in characters, and the language they must be in (None: any).

    `refusals` lets refusals pass; `toxic` are words that no row may hold.
    """

    shortest_question: int = 4
    longest_question: int = 4_000
    shortest_answer: int = 1
    longest_answer: int = 8_000
    language: Language | None = None
    refusals: bool = False
    toxic: Sequence[str] = ()


@dataclass
class Filters:
    """Judges one row after the other; those that pass join the pool that later ones are compared with."""

    limits: Limits = Limits()
    pool: NearDuplicates = field(default_factory=lambda: NearDuplicates(says_the_same=same_content))
    _seen: set[str] = field(default_factory=set)

    def add_known(self, questions: Iterable[str]) -> None:
        """Put questions into the pool that are there already, such as seeds."""
        for question in questions:
            self._seen.add(_folded(question))
            self.pool.add(question)

    def reason(self, row: Row) -> str | None:
        """Why a row is kept out; None takes it into the pool."""
        for name, fails in _CHECKS.items():
            if fails(row, self.limits):
                return name
        question = _folded(row.question)
        if question in self._seen:
            return "duplicate"
        match = self.pool.add(row.question)
        if match is not None:
            return "near_duplicate"
        self._seen.add(question)
        return None


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _incomplete(row: Row, _: Limits) -> bool:
    return not all(user.strip() and assistant.strip() for user, assistant in row.turns)


def _too_short(row: Row, limits: Limits) -> bool:
    return len(row.question) < limits.shortest_question or len(row.answer) < limits.shortest_answer


def _too_long(row: Row, limits: Limits) -> bool:
    return len(row.question) > limits.longest_question or len(row.answer) > limits.longest_answer


def _other_language(row: Row, limits: Limits) -> bool:
    """By the question alone: the answer to "translate into English" is rightly in another language."""
    return limits.language is not None and language_of(row.question) != limits.language


def _refusal(row: Row, limits: Limits) -> bool:
    return not limits.refusals and any(_REFUSAL.search(assistant[:120]) for _, assistant in row.turns)


def _placeholder(row: Row, _: Limits) -> bool:
    return _PLACEHOLDER.search(row.question) is not None or _PLACEHOLDER.search(row.answer) is not None


def _garbled(row: Row, _: Limits) -> bool:
    """Characters that could not be read, or one piece of text over and over again."""
    text = row.question + row.answer
    return _UNREADABLE in text or _REPEATED.search(text) is not None


def _copied(row: Row, _: Limits) -> bool:
    """An answer that is what was asked. An input may come back changed a little: that is what editing is."""
    for user, assistant in row.turns:
        if rouge_l_of_words(words(user), words(assistant)) >= 0.9:
            return True
    return bool(row.input) and _folded(row.input) == _folded(row.answer)


def _toxic(row: Row, limits: Limits) -> bool:
    text = f"{row.question}\n{row.answer}".casefold()
    return any(
        word in text if not word.isascii() else re.search(rf"\b{re.escape(word)}\b", text) for word in limits.toxic
    )


_CHECKS: dict[str, Callable[[Row, Limits], bool]] = {
    "incomplete": _incomplete,
    "too_short": _too_short,
    "too_long": _too_long,
    "other_language": _other_language,
    "refusal": _refusal,
    "placeholder": _placeholder,
    "garbled": _garbled,
    "copied": _copied,
    "toxic": _toxic,
}
REASONS = (*_CHECKS, "duplicate", "near_duplicate")
"""All reasons of these filters."""
