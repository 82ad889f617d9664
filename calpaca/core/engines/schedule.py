"""Which tokens run in a turn: one of every answer under way, and a bounded number of prompt tokens beside them."""

from __future__ import annotations

from collections.abc import Sequence

from calpaca.core.engines.row import Row
from calpaca.core.engines.step import Span

TURN_SECONDS = 0.1
"""How long the prompt tokens of a turn may take. It is what a new token of the answers under way waits for them."""

FEWEST, MOST = 16, 2048
"""Bounds of the prompt tokens of a turn."""


class Pace:
    """How many prompt tokens fit into a turn, from the time that turns took."""

    def __init__(self) -> None:
        self.budget = 2 * FEWEST

    def note(self, tokens: int, seconds: float) -> None:
        """Take a turn into account. Those with few tokens wait for memory and say little about one token more."""
        if tokens < FEWEST:
            return
        fitting = TURN_SECONDS * tokens / seconds
        smoothed = self.budget + 0.25 * (fitting - self.budget)
        self.budget = round(min(max(smoothed, FEWEST), MOST))


def choose_spans(rows: Sequence[Row], budget: int) -> list[Span]:
    """What runs next of `rows`, which stand in the order in which they came."""
    spans = [Span(row, row.ids[-1:], 1) for row in rows if row.pending == 1]
    for row, tokens in _share([row for row in rows if row.pending > 1], budget).items():
        assert row.place is not None
        begin = row.place.filled
        spans.append(Span(row, row.ids[begin : begin + tokens], int(tokens == row.pending)))
    return spans


def _share(rows: Sequence[Row], budget: int) -> dict[Row, int]:
    """Prompt tokens for each row: half of them for the oldest, so that none waits for ever, the others for the
    shortest, so that short requests do not wait for long ones."""
    if not rows:
        return {}
    shares = {rows[0]: min(rows[0].pending, (budget + 1) // 2)}
    left = budget - shares[rows[0]]
    for row in sorted(rows, key=lambda row: row.pending):
        more = min(row.pending - shares.get(row, 0), left)
        if more:
            shares[row] = shares.get(row, 0) + more
            left -= more
    return shares
