"""ROUGE-L: how much of two texts is the same words in the same order (Lin 2004, https://aclanthology.org/W04-1013).

The words are those of `calpaca.core.text_measures.words`, so that Chinese is compared by characters; the stock measure
keeps ASCII letters and digits alone, and finds nothing in common in any two Chinese texts.
"""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from calpaca.core.text_measures import words


def rouge_l(text: str, reference: str) -> float:
    """The F-measure of ROUGE-L, 0 to 1: the harmonic mean of both shares of the longest common subsequence."""
    return rouge_l_of_words(words(text), words(reference))


def rouge_l_of_words(text: Sequence[str], reference: Sequence[str]) -> float:
    """`rouge_l` of texts that are cut into words already; two empty ones have nothing in common."""
    total = len(text) + len(reference)
    return 2 * LCSseq.similarity(text, reference) / total if total else 0.0
