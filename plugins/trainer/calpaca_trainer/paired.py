"""Whether one of two is better on the same questions: paired statistics over scores, of which more is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_RESAMPLES = 9999


@dataclass(frozen=True)
class PairedTest:
    """`difference` is the mean of candidate minus rival, [`low`, `high`] its 95 % bootstrap interval, and `p` the one-sided
    probability of such a difference by chance, by the test named in `test`. `won` and `lost` count questions."""

    test: str
    questions: int
    candidate: float
    rival: float
    difference: float
    low: float
    high: float
    won: int
    lost: int
    p: float

    def is_better(self, level: float) -> bool:
        """Both must say so: the test at `level`, and the interval, which lies above 0."""
        return self.p < level and self.low > 0


def compare(candidate: Sequence[float], rival: Sequence[float], *, seed: int = 0) -> PairedTest:
    """Compare scores of the same questions, in the same order.

    Scores of 0 and 1 alone are compared by McNemar's exact test (McNemar 1947: a sign test over the questions on which the
    two differ), all others by Wilcoxon's signed-rank test (1945) with Pratt's treatment of equal ones (1959). The interval
    is the percentile bootstrap (Efron 1979) over questions. Raises ValueError for scores that do not pair up.
    """
    import numpy as np

    ours, theirs = np.asarray(candidate, dtype=float), np.asarray(rival, dtype=float)
    if ours.shape != theirs.shape or not ours.size:
        raise ValueError(f"{ours.size} scores cannot be paired with {theirs.size}")
    differences = ours - theirs
    is_binary = bool(np.isin([ours, theirs], (0.0, 1.0)).all())
    low, high = _interval(differences, seed)
    return PairedTest(
        "McNemar, exact" if is_binary else "Wilcoxon signed-rank", ours.size,
        float(ours.mean()), float(theirs.mean()), float(differences.mean()), low, high,
        int((differences > 0).sum()), int((differences < 0).sum()),
        _mcnemar(differences) if is_binary else _wilcoxon(differences),
    )  # fmt: skip


def _mcnemar(differences: np.ndarray) -> float:
    from scipy.stats import binomtest

    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(won, won + lost, 0.5, alternative="greater").pvalue) if won + lost else 1.0


def _wilcoxon(differences: np.ndarray) -> float:
    from scipy.stats import wilcoxon

    if not differences.any():
        return 1.0
    result: Any = wilcoxon(differences, alternative="greater", zero_method="pratt")
    return float(result.pvalue)


def _interval(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """The middle 95 % of means over questions drawn with replacement."""
    import numpy as np

    chance = np.random.default_rng(seed)
    means = [differences[chance.integers(0, differences.size, differences.size)].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
