"""What a run of instruction data did: counts, spread, lengths, diversity, cost, and a picture of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import mean, median, quantiles
from typing import Any

from calpaca.core.rouge import rouge_l_of_words
from calpaca.core.text_measures import words
from calpaca_crawl.kept import KeptRow
from calpaca_crawl.run import Run

_COMPARED = 300


def report(run: Run, pool: str) -> dict[str, Any]:
    """The figures of a run; `pool` identifies what its rows follow from."""
    usage, kept = run.spending.usage, run.kept
    return {
        "pool": pool,
        "rows": len(kept),
        "stopped": run.stopped,
        "replies": run.replies,
        "reused_replies": run.job.reused,
        "rejected": dict(Counter(each.reason for each in run.rejected).most_common()),
        "failed_requests": dict(run.failures),
        "methods": dict(Counter(str(row.provenance["method"]) for row in kept).most_common()),
        "topics": dict(
            Counter(str(row.provenance["topic"]) for row in kept if "topic" in row.provenance).most_common()
        ),
        "tasks": dict(Counter(str(row.provenance["task"]) for row in kept if "task" in row.provenance).most_common()),
        "scores": dict(sorted(Counter(row.provenance["score"] for row in kept if "score" in row.provenance).items())),
        "question_characters": _spread([len(row.row.question) for row in kept]),
        "answer_characters": _spread([len(row.row.answer) for row in kept]),
        "diversity": diversity([row.row.question for row in kept]),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "lost_prompt_tokens": run.spending.lost.prompt_tokens,
        "lost_completion_tokens": run.spending.lost.completion_tokens,
        "rows_per_1000_generated_tokens": round(1000 * len(kept) / max(usage.completion_tokens, 1), 3),
        "cost": round(run.spending.cost, 6),
        "seconds": round(run.spending.seconds, 1),
        "heated": run.heat,
    }


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    ninth = quantiles(lengths, n=10)[-1] if len(lengths) > 1 else lengths[0]
    return {"least": min(lengths), "median": median(lengths), "ninth_decile": round(ninth, 1), "most": max(lengths)}


def diversity(questions: Sequence[str]) -> dict[str, float]:
    """`distinct_pairs`: pairs of neighbouring words (in Chinese, characters) that are different ones, as a share of all
    (distinct-2, Li et al. 2016). `nearest`: mean ROUGE-L of a question to the one that is most like it, of 300 at most.
    """
    if len(questions) < 2:
        return {}
    cut = [words(question) for question in Random(0).sample(list(questions), min(len(questions), _COMPARED))]  # noqa: S311
    pairs = [pair for tokens in cut for pair in pairwise(tokens)]
    nearest = [
        max(rouge_l_of_words(tokens, other) for place, other in enumerate(cut) if place != own)
        for own, tokens in enumerate(cut)
    ]
    return {"distinct_pairs": round(len(set(pairs)) / max(len(pairs), 1), 4), "nearest": round(mean(nearest), 4)}


def draw(figures: dict[str, Any], kept: Sequence[KeptRow], path: Path) -> None:
    """Write the picture of a report (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    outcomes, lengths, spread = figure.subplots(1, 3)
    counts = {"kept": figures["rows"], **figures["rejected"]}
    outcomes.barh(list(counts)[::-1], list(counts.values())[::-1])
    outcomes.set_title("records")
    lengths.hist([[len(row.row.question) for row in kept], [len(row.row.answer) for row in kept]], bins=20)
    lengths.legend(["questions", "answers"])
    lengths.set_title("characters")
    rows_of_topics = sorted(figures["topics"].values(), reverse=True)
    spread.bar(range(len(rows_of_topics)), rows_of_topics)
    spread.set_title(f"rows of each of {len(rows_of_topics)} topics")
    figure.savefig(path, format="png", dpi=100)
