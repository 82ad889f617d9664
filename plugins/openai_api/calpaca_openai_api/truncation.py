"""`truncation: auto`: the oldest turns of a conversation go until the rest fits the context, counted by the model itself."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from calpaca_openai_api.chat import DEFAULT_TOKENS, ChatPlan


@dataclass(frozen=True)
class Dropped:
    """What was left out: messages, and the tokens that they would have taken."""

    messages: int
    tokens: int

    @property
    def notice(self) -> str:
        return f"Not used, for want of room: the oldest messages ({self.messages}, {self.tokens} tokens)."


def truncated(plan: ChatPlan) -> tuple[ChatPlan, Dropped | None]:
    """The plan with the latest turns that leave room for the answer. What stands before the first user message, the
    instructions, stays, and so does the last turn, even where it is too long.

    A turn is a user's message and what follows it, so that no call is parted from its output. Takes time: the
    conversation is rendered and counted about as often as its number of turns has bits.
    """
    length = plan.model.context_length
    if length is None:
        return plan, None
    room = length - (plan.sampling.max_new_tokens or min(DEFAULT_TOKENS, length // 4))
    starts = [index for index, message in enumerate(plan.messages) if message["role"] == "user"]
    whole = _count(plan, plan.messages)
    if whole <= room or len(starts) < 2:
        return plan, None
    kept = [[*plan.messages[: starts[0]], *plan.messages[start:]] for start in starts]
    first = bisect_left(kept, True, lo=1, hi=len(kept) - 1, key=lambda messages: _count(plan, messages) <= room)
    dropped = Dropped(starts[first] - starts[0], whole - _count(plan, kept[first]))
    return replace(plan, messages=kept[first]), dropped


def _count(plan: ChatPlan, messages: list[dict[str, Any]]) -> int:
    return plan.model.count_tokens(messages, plan.tools)
