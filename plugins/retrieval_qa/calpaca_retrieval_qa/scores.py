"""What an evaluation measures, from the record of each question."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What came of a question.

    `rank` is that of the first passage that holds the answer, from 1, 0 for none among those looked up. `citations` says
    of each citation shown whether its words hold the expected answer where it stands. `right`: an expected answer stands
    in the answer, word for word.
    """

    answerable: bool
    supported: bool
    rank: int = 0
    exact: bool = False
    f1: float = 0.0
    right: bool = False
    citations: tuple[bool, ...] = ()
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Outcome:
        return cls(**{**value, "citations": tuple(value["citations"])})


@dataclass(frozen=True)
class Scores:
    """The figures of one configuration; None where there is nothing to measure.

    `recall_at_1`, `recall_at_k`, `mrr` and `ndcg` are of the passages, of which one, that with the answer, is relevant.
    `exact_match`, `f1` and `right` are of answerable questions, a refusal counting as wrong. `citation_precision` is the
    share of the citations shown that hold the expected answer; `right_and_cited` the share of right answers that have
    one. `abstention_precision` is the share of refused questions that have no answer, `abstention_recall` the share of
    those that are refused. `seconds` are of a question from its asking to the end of its answer.
    """

    questions: int
    answerable: int
    recall_at_1: float | None
    recall_at_k: float | None
    mrr: float | None
    ndcg: float | None
    exact_match: float | None
    f1: float | None
    right: float | None
    citation_precision: float | None
    right_and_cited: float | None
    abstention_precision: float | None
    abstention_recall: float | None
    seconds_median: float | None
    seconds_95: float | None
    prompt_tokens: float | None
    completion_tokens: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(outcomes: Sequence[Outcome], k: int) -> Scores:
    """The figures of a set; `k` is how many passages were asked for."""
    answerable = [each for each in outcomes if each.answerable]
    right = [each for each in answerable if each.right]
    refused = [each for each in outcomes if not each.supported]
    unanswerable = [each for each in outcomes if not each.answerable]
    shown = [holds for each in answerable for holds in each.citations]
    seconds = sorted(each.seconds for each in outcomes)
    return Scores(
        questions=len(outcomes),
        answerable=len(answerable),
        recall_at_1=_mean(answerable, lambda each: each.rank == 1),
        recall_at_k=_mean(answerable, lambda each: 0 < each.rank <= k),
        mrr=_mean(answerable, lambda each: 1 / each.rank if each.rank else 0.0),
        ndcg=_mean(answerable, lambda each: 1 / math.log2(each.rank + 1) if each.rank else 0.0),
        exact_match=_mean(answerable, lambda each: each.exact),
        f1=_mean(answerable, lambda each: each.f1),
        right=_mean(answerable, lambda each: each.right),
        citation_precision=mean(shown) if shown else None,
        right_and_cited=_mean(right, lambda each: any(each.citations)),
        abstention_precision=_mean(refused, lambda each: not each.answerable) if unanswerable else None,
        abstention_recall=_mean(unanswerable, lambda each: not each.supported),
        seconds_median=median(seconds) if seconds else None,
        seconds_95=seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else None,
        prompt_tokens=_mean(outcomes, lambda each: each.prompt_tokens),
        completion_tokens=_mean(outcomes, lambda each: each.completion_tokens),
    )


def _mean(outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> float | None:
    return mean(float(value(each)) for each in outcomes) if outcomes else None
