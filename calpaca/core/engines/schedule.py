"""Which tokens run in a turn: one of every answer under way, and a bounded number of prompt tokens beside them."""

from __future__ import annotations

from collections.abc import Sequence

from calpaca.core.engines.prefix import BLOCK
from calpaca.core.engines.row import Row
from calpaca.core.engines.step import Span

PIECE_SECONDS = 0.1
"""How long a piece of a long prompt may take; answers under way and new requests wait that long for it."""

BURST_SECONDS = 0.5
"""The same for prompts that are complete with this turn: the sooner they are, the more rows share the next ones."""

FEWEST, MOST = 32, 2048
"""Bounds of a piece, in tokens."""


class Pace:
    """How many tokens fit into a turn, from the time that turns took."""

    def __init__(self) -> None:
        self.piece = 2 * FEWEST

    @property
    def burst(self) -> int:
        return round(self.piece * BURST_SECONDS / PIECE_SECONDS)

    def note(self, tokens: int, seconds: float) -> None:
        """Take a turn into account. Those with few tokens wait for memory and say little about one token more."""
        if tokens >= FEWEST:
            fitting = PIECE_SECONDS * tokens / seconds
            self.piece = round(min(max(self.piece + 0.25 * (fitting - self.piece), FEWEST), MOST))


MOST_GUESSING = 4
"""Rows that may run at once where guesses are checked: past that, a step has enough tokens without them."""

FREE = 6
"""Tokens of a step that take no longer than one, since all of them wait for the same weights (SmolLM2 on AVX-512, in
float32 and bfloat16: 1.0 times as long with 6, 1.3 with 8, 1.5 with 12)."""


def choose_spans(rows: Sequence[Row], pace: Pace, *, guesses: bool, most_scored: int) -> list[Span]:
    """What runs next of `rows`, which stand in the order in which they came.

    Rows that score their prompt take logits at each of its tokens: of those there are at most `most_scored`.
    """
    guesses = guesses and len(rows) <= MOST_GUESSING
    free = max(FREE // max(len(rows), 1) - 1, 1)
    answers = [(row, row.draft(free) if guesses else []) for row in rows if row.pending == 1]
    spans = [Span(row, [row.ids[-1], *draft], 1 + len(draft), guesses=len(draft)) for row, draft in answers]
    for row, share in _share([row for row in rows if row.pending > 1 and not follows(row)], pace).items():
        tokens = min(share, most_scored) if row.scores_prompt else share
        if tokens:
            spans.append(_piece(row, tokens))
        most_scored -= tokens if row.scores_prompt else 0
    return spans


def _piece(row: Row, tokens: int) -> Span:
    """The next tokens of a row's prompt. The last of all has no other after it that could be scored."""
    assert row.place is not None
    begin = row.place.filled
    last = int(tokens == row.pending)
    scored = tokens - last if row.scores_prompt else 0
    return Span(row, row.ids[begin : begin + tokens], scored + last, scored)


def _share(rows: Sequence[Row], pace: Pace) -> dict[Row, int]:
    """Prompt tokens for each row: half a piece for the oldest, so that none waits for ever; then the shortest whole, so
    that short requests do not wait for long ones; and of the first that is not complete with that, a piece."""
    if not rows:
        return {}
    shares = {rows[0]: min(rows[0].pending, (pace.piece + 1) // 2)}
    for row in sorted(rows, key=lambda row: row.pending):
        others = sum(shares.values()) - shares.get(row, 0)
        if others + row.pending <= pace.burst:
            shares[row] = row.pending
            continue
        if pace.piece > others:
            shares[row] = min(row.pending, pace.piece - others)
        break
    return shares


def follows(row: Row) -> bool:
    """Whether a row waits for another's prompt, to take the beginning that they share from it."""
    if row.leader is not None and (row.leader.place is None or row.leader.pending <= 1):
        row.leader = None
    return row.leader is not None


def find_leader(row: Row, others: Sequence[Row]) -> Row | None:
    """A row whose prompt is under way and shares the first half, or more, of this one's."""
    if row.scores_prompt:
        return None  # it needs what the model says of the beginning, too
    half = row.ids[: max(BLOCK, len(row.ids) // 2)]
    for other in others:
        if other.adapter == row.adapter and other.pending > 1 and other.ids[: len(half)] == half:
            return other
    return None
