"""One ranking out of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

RANK_CONSTANT = 60
"""Reciprocal rank fusion's k, as its authors found it best."""

WORD_WEIGHT = 7.0
"""What all of a question's words weigh against similarity, in its standard deviations; 4 to 8 do about as well
(docs/quality.md)."""

N = TypeVar("N", str, int)


def by_ranks(rankings: Sequence[Sequence[N]], constant: int = RANK_CONSTANT) -> list[N]:
    """Reciprocal rank fusion: the sum of 1 / (constant + rank), ranks from 1. Equal sums stand as they came.

    Cormack, Clarke and Büttcher, SIGIR 2009.
    """
    sums: dict[N, float] = {}
    for ranking in rankings:
        for rank, name in enumerate(ranking, 1):
            sums[name] = sums.get(name, 0.0) + 1.0 / (constant + rank)
    return sorted(sums, key=lambda name: -sums[name])


def by_scores(
    similarities: NDArray[np.float32], shares: NDArray[np.float32], nearest: int, weight: float = WORD_WEIGHT
) -> NDArray[np.float32]:
    """Scores [n] of candidates: how far a similarity [n] lies above those of the `nearest` most similar candidates, in
    standard deviations, and the share [n] of the question's words that it holds, times `weight`.

    A convex combination in the sense of Bruch, Gai and Ingber, ACM TOIS 42 (2023). The similarity's scale, which differs
    from model to model and from question to question, falls out; the share's does not, so that words which match by
    chance, as in a text of another language, count little.
    """
    top = np.sort(similarities)[-nearest:]
    spread = float(top.std())
    standard = (similarities - top.mean()) / (spread if spread > 0.0 else 1.0)
    scores: NDArray[np.float32] = (standard + weight * shares).astype(np.float32)
    return scores
