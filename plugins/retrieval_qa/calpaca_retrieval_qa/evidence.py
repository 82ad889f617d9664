"""Whether passages can hold the answer to a question at all, before a model is asked.

Two signs are used. *Overlap*: the share of the question's content words (English: their first five letters; Chinese:
pairs of characters) that stand in one passage. *Score*: the cosine similarity that the embedder gives, whose scale
differs between embedders: a threshold comes with calpaca for the catalogue's default, for others `calibration` chooses
one. Measured on XQuAD (24 articles,
632 questions in each language; thresholds chosen on half of the articles, rates from the other half) in
`bench/evidence.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from calpaca.core.events import Source
from calpaca.core.language import language_of

Kind = Literal["en", "zh", "across"]
"""The language of a question whose documents are in the same one, or that they are in another."""

_LEAST_OVERLAP = 0.25
_OVERLAP_WEIGHT = 0.1
_STEM = 5

_WORD = re.compile(r"[^\W_\u3400-\u9fff]+")
_HAN = re.compile(r"[\u3400-\u9fff]+")
_STOP = frozenset(
    [
        *("what", "which", "who", "whom", "whose", "when", "where", "why", "how", "did", "does", "do", "is", "are"),
        *("was", "were", "be", "been", "being", "has", "have", "had", "can", "could", "will", "would", "should", "may"),
        *("the", "a", "an", "of", "in", "on", "at", "to", "for", "from", "by", "with", "and", "or", "not", "no", "as"),
        *("that", "this", "these", "those", "it", "its", "there", "than", "their", "they", "he", "she", "his", "her"),
        *("you", "your", "we", "our", "i", "my", "me", "about", "into", "after", "before", "during", "between", "some"),
        *("other", "most", "more", "also", "many", "much", "name", "one", "any", "please", "tell", "say", "says"),
    ]
)
_HAN_STOP = re.compile(
    "[的了是在有和与及哪什么谁怎样如何多少几为吗呢些个位里时候名字叫做它他她们这那被把由对于之其中从到请问]"
)


@dataclass(frozen=True)
class Verdict:
    """Whether the passages support an answer; `remark` is a line for the user about how that was judged."""

    supported: bool
    remark: str = ""


@dataclass(frozen=True)
class Signal:
    """How strongly passages speak for an answer: `score + 0.1 * overlap`, across languages the score alone."""

    kind: Kind
    value: float


def signal(question: str, passages: Sequence[Source]) -> Signal | None:
    """The signal of the best passages; None where nothing was found or scored."""
    best = max((passage.score for passage in passages if passage.score is not None), default=None)
    if best is None:
        return None
    highest = _highest_overlap(question, passages)
    if highest is None:
        return Signal("across", best)
    return Signal(language_of(question), best + _OVERLAP_WEIGHT * highest)


@dataclass(frozen=True)
class EvidenceRule:
    """When passages count as support.

    `least` is the least signal by kind of question; without one for a kind, a quarter of the question's words must stand
    in a passage. `embedder` names whose scores these are; `caution` says what the thresholds were not chosen for.
    """

    least: Mapping[Kind, float] = field(default_factory=dict)
    embedder: str = ""
    caution: str = ""

    def judge(self, question: str, passages: Sequence[Source]) -> Verdict:
        """A question without content words, or in another language than the passages, is judged by its score alone."""
        if not passages:
            return Verdict(False)
        found = signal(question, passages)
        if found is not None and found.kind in self.least:
            return Verdict(found.value >= self.least[found.kind], self._remark(self.caution))
        highest = _highest_overlap(question, passages)
        return Verdict(highest is None or highest >= _LEAST_OVERLAP, self._remark("not calibrated"))

    def _remark(self, state: str) -> str:
        if not (self.embedder and state):
            return ""
        judged = " is judged by its words alone" if state == "not calibrated" else " may be judged wrongly"
        return (
            f"The scores of the embedding model {self.embedder} are {state}: whether the documents answer the question"
            f"{judged}. `--calibrate SET` chooses a threshold."
        )


E5_RULE = EvidenceRule({"en": 0.866, "zh": 0.902, "across": 0.735}, "multilingual-e5-small")
"""The catalogue names the very weights, so that their name stands for their fingerprint."""


def _highest_overlap(question: str, passages: Sequence[Source]) -> float | None:
    """The best share of the question's words in one passage; None where they cannot be compared."""
    shares = [overlap(question, passage.text) for passage in passages]
    if not _same_script(question, passages):
        return None
    known = [share for share in shares if share is not None]
    return max(known) if len(known) == len(shares) else None


def overlap(question: str, text: str) -> float | None:
    """Share of the question's content words that stand in a text; None for a question without any."""
    wanted = content_words(question)
    words = Words(text)
    return sum(word in words for word in wanted) / len(wanted) if wanted else None


class Words:
    """A text that is asked whether it holds a content word."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._stems = {word.lower()[:_STEM] for word in _WORD.findall(text)}

    def __contains__(self, word: str) -> bool:
        return word in self._text if _HAN.match(word) else word in self._stems


def content_words(question: str) -> set[str]:
    """Beginnings of the words that say what a question is about, and pairs of Chinese characters."""
    words = [word.lower() for word in _WORD.findall(question)]
    found = {word[:_STEM] for word in words if word not in _STOP and len(word) > 1}
    for run in _HAN.findall(question):
        for part in _HAN_STOP.split(run):
            found |= {part[start : start + 2] for start in range(max(1, len(part) - 1)) if part}
    return found


def _same_script(question: str, passages: Sequence[Source]) -> bool:
    """Whether question and passages are both Chinese, or both not."""
    return language_of(question) == language_of("\n".join(passage.text for passage in passages))
