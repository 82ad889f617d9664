"""The sentences of passages that share most with a question.

A small model loses the thread in a page of passages. Shown the likeliest sentences once more, just before the question,
SmolLM2-135M answered 23 of 34 questions rightly instead of 11 with the same four passages alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from calpaca.documents.sentences import blocks, sentences
from calpaca_retrieval_qa.evidence import Words, content_words

_RANK_COST = 0.3
"""What a sentence loses for each passage that was found to be nearer than its own."""


def excerpt(question: str, texts: Sequence[str], count: int = 2) -> str:
    """The `count` sentences of `texts` (nearest first) that hold most of the question's words, rare ones above all.

    They stand in the order of the texts. Without any shared word, as between two languages, it is the nearest text.
    """
    found = [(rank, sentence, Words(sentence)) for rank, text in enumerate(texts) for sentence in _sentences(text)]
    weights = {
        word: math.log(1.0 + len(found) / (1.0 + sum(word in words for _, _, words in found)))
        for word in content_words(question)
    }
    matches = [sum(weight for word, weight in weights.items() if word in words) for _, _, words in found]
    if not any(matches):
        return _line(texts[0]) if texts else ""
    scores = [match - _RANK_COST * rank for match, (rank, _, _) in zip(matches, found, strict=True)]
    best = sorted(range(len(found)), key=lambda position: -scores[position])[:count]
    return " ".join(_line(found[position][1]) for position in sorted(best))


def _sentences(text: str) -> list[str]:
    return [
        text[start:end]
        for block in blocks(text, "markdown")
        if not block.level
        for start, end in sentences(text, block)
    ]


def _line(text: str) -> str:
    """Wrapped lines as one."""
    return " ".join(text.split())
