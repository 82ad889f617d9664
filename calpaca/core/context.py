"""The context ledger: what a model was sent, what was left out for lack of room, and by which policy.

| policy      | what happens to what does not fit                           | conversations (`fit`) | documents (apps) |
| `error`     | nothing is sent; the error says by how many tokens           | yes, the default      | yes              |
| `drop`      | the oldest turns, or the least fitting passages, are left out | yes                   | yes              |
| `summarise` | the model sums it up, and the summary is sent in its place   | yes                   | yes              |
| `refine`    | it is sent in several prompts, each improving the answer      | no                    | yes              |

Nothing is left out in silence: every result carries a `ContextUse`. Tokens are counted on the prompt as the model's own
template renders it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, get_args

from calpaca.core.engine import ConversationEngine, Usage
from calpaca.core.engines.limits import DEFAULT_NEW_TOKENS
from calpaca.core.errors import ContextOverflowError, UsageError, unknown_name
from calpaca.core.template import Message

if TYPE_CHECKING:
    from calpaca.core.model import Model

ContextPolicy = Literal["error", "drop", "summarise", "refine"]

CONVERSATION_POLICIES: tuple[ContextPolicy, ...] = ("error", "drop", "summarise")
"""Those that `fit` serves."""

_ANSWER_SHARE = 4
"""An answer of no given length gets one part in so many of the context, or 512 tokens where that is less."""


@dataclass(frozen=True)
class ContextUse:
    """What was sent for one result.

    `sent_tokens` counts all `prompts`, `largest_prompt` the longest of them; `answer_tokens` were kept free for its
    answer. `dropped` counts the units (messages, passages) that were not sent as they stand, `dropped_tokens` by how much
    they would have lengthened the prompt. `summary` is what was sent in their place, and is one of the prompt's messages;
    `summary_usage` is what writing it took. `estimated` where a server renders the prompt and does not count.
    """

    policy: ContextPolicy
    context_length: int | None = None
    answer_tokens: int = 0
    sent_tokens: int = 0
    prompts: int = 1
    largest_prompt: int = 0
    dropped: int = 0
    dropped_tokens: int = 0
    unit: str = "message"
    summary: str | None = None
    summary_usage: Usage = field(default_factory=Usage)
    estimated: bool = False

    def sent(self, usage: Usage) -> ContextUse:
        """The same with the prompt's tokens as the engine counted them."""
        tokens = usage.prompt_tokens
        return replace(self, sent_tokens=tokens, largest_prompt=tokens, estimated=self.estimated or usage.estimated)

    def as_dict(self) -> dict[str, Any]:
        """As `response_metadata` and `--json` have it."""
        values = asdict(self)
        used = values.pop("summary_usage")
        return {**values, "summary_tokens": used["completion_tokens"]} if self.summary is not None else values

    def line(self) -> str:
        """One line for a person."""
        about = "about " if self.estimated else ""
        prompts = f" in {self.prompts} prompts, the longest of {self.largest_prompt:,}" if self.prompts > 1 else ""
        length = f"; the context holds {self.context_length:,}" if self.context_length is not None else ""
        return f"{about}{self.sent_tokens:,} tokens sent{prompts}{length}; {self._left_out()}"

    def _left_out(self) -> str:
        if not self.dropped:
            return "nothing left out"
        units = f"{self.dropped} {self.unit}{'s' if self.dropped > 1 else ''} ({self.dropped_tokens:,} tokens)"
        if self.summary is None:
            return f"{units} left out"
        return f"{units} summed up in {self.summary_usage.completion_tokens}"


@dataclass(frozen=True)
class FittedMessages:
    """Messages that fit the context, and what became of those that did not."""

    messages: tuple[Message, ...]
    use: ContextUse


def check_policy(policy: str, served: Sequence[ContextPolicy] = CONVERSATION_POLICIES) -> ContextPolicy:
    """Raise UsageError for a policy that there is not, or that is not among the `served` ones."""
    known: tuple[ContextPolicy, ...] = get_args(ContextPolicy)
    for each in served:
        if each == policy:
            return each
    if policy in known:
        raise UsageError(f"The context policy '{policy}' is not for this.", f"Choose one of: {', '.join(served)}.")
    raise UsageError(*unknown_name("context policy", policy, served))


def answer_room(max_new_tokens: int | None, context_length: int) -> int:
    """Tokens kept free for an answer."""
    return max_new_tokens or min(DEFAULT_NEW_TOKENS, context_length // _ANSWER_SHARE)


def fit(
    model: Model,
    messages: Sequence[Message],
    policy: ContextPolicy = "error",
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    max_new_tokens: int | None = None,
) -> FittedMessages:
    """Make a conversation fit the model's context together with its answer.

    `error` sends everything: the engine counts and refuses. `drop` leaves out the oldest turns, as few as will do; never
    system messages, the last user message or what comes after the last tool call, and no tool call without its results.
    `summarise` has the model sum up the oldest turns instead, and sends that as a user's message; it then keeps at most
    half of the room for the turns that stay, so that the next question does not need another summary.

    Blocks while the model writes a summary. Where a server does not tell its context length, everything is sent.
    Raises ContextOverflowError when not even what must stay fits, UsageError for another policy.
    """
    check_policy(policy)
    limit = model.context_length
    if policy == "error" or limit is None:
        use = ContextUse(policy, limit, max_new_tokens or 0, estimated=isinstance(model.engine, ConversationEngine))
        return FittedMessages(tuple(messages), use)
    conversation = _Conversation(model, tuple(messages), tuple(tools), limit, answer_room(max_new_tokens, limit))
    cut = conversation.least(conversation.room)
    if policy == "summarise" and cut:
        return conversation.summarised()
    return conversation.dropped(policy, cut, max_new_tokens or 1)  # an answer of no given length takes what is left


class _Conversation:
    """A conversation and the cuts it allows: cut `k` leaves out the `k` oldest groups that may be left out together."""

    def __init__(
        self, model: Model, messages: tuple[Message, ...], tools: tuple[Mapping[str, Any], ...], limit: int, answer: int
    ) -> None:
        self.model = model
        self.messages = messages
        self.tools = tools
        self.limit = limit
        self.answer = answer
        self.room = limit - answer
        self.cuts = cuts(messages)
        self.tokens = cache(lambda cut: self.count(self.kept(cut)))

    def count(self, messages: Sequence[Message]) -> int:
        return self.model.count_tokens(messages, self.tools)

    def kept(self, cut: int) -> list[Message]:
        return [message for position, message in enumerate(self.messages) if position not in self.cuts[cut]]

    def left_out(self, cut: int) -> list[Message]:
        return [self.messages[position] for position in sorted(self.cuts[cut])]

    def least(self, room: int) -> int:
        """The smallest cut that fits into `room`, else the largest there is."""
        found = bisect_left(range(len(self.cuts)), True, key=lambda cut: self.tokens(cut) <= room)
        return min(found, len(self.cuts) - 1)

    def use(self, policy: ContextPolicy, cut: int) -> ContextUse:
        tokens = self.tokens(cut)
        return ContextUse(
            policy, self.limit, self.answer, tokens, 1, tokens,
            dropped=len(self.cuts[cut]), dropped_tokens=self.tokens(0) - tokens,
            estimated=isinstance(self.model.engine, ConversationEngine),
        )  # fmt: skip

    def dropped(self, policy: ContextPolicy, cut: int, needed: int) -> FittedMessages:
        """What a cut keeps, if `needed` tokens are left for the answer."""
        if self.tokens(cut) + needed > self.limit:
            raise ContextOverflowError(self.tokens(cut), needed, self.limit)
        return FittedMessages(tuple(self.kept(cut)), self.use(policy, cut))

    def summarised(self) -> FittedMessages:
        """What the smallest cut keeps that fits half of the room, with a summary of the rest after the system messages."""
        from calpaca.core.context_summary import longest_fitting, summarise_turns, summary_message

        cut = self.least(self.room // 2)
        turns, kept = self.left_out(cut), self.kept(cut)
        head = len(list(takewhile(lambda message: message["role"] == "system", kept)))

        def with_summary(text: str) -> list[Message]:
            return [*kept[:head], summary_message(turns, text), *kept[head:]]

        empty = self.count(with_summary(""))
        if empty + _LEAST_SUMMARY > self.room:
            raise ContextOverflowError(empty + _LEAST_SUMMARY, self.answer, self.limit)
        most = min(self.room - empty, self.limit // _ANSWER_SHARE, DEFAULT_NEW_TOKENS)
        written = summarise_turns(self.model, turns, most)
        text = longest_fitting(written.text, lambda part: self.count(with_summary(part)) <= self.room)
        tokens = self.count(with_summary(text))
        use = replace(
            self.use("summarise", cut), sent_tokens=tokens, largest_prompt=tokens, summary=text, summary_usage=written.usage
        )  # fmt: skip
        return FittedMessages(tuple(with_summary(text)), use)


_LEAST_SUMMARY = 16
"""Tokens below which a summary says nothing."""


def cuts(messages: Sequence[Message]) -> list[frozenset[int]]:
    """Sets of positions that may be left out of a conversation, the empty one first, each holding the one before.

    A turn is left out whole: a user's message and all up to the next one. After the last user's message it is a tool call
    with its results. Cuts that would keep a result whose call is gone are not among them.
    """
    groups, last_user = _groups(messages)
    free = [group for group in groups[:-1] if last_user not in group]
    calls = _calls(messages)
    found = [frozenset[int]()]
    for count in range(1, len(free) + 1):
        gone = frozenset(position for group in free[:count] for position in group)
        if all((call in gone) == (result in gone) for result, call in calls.items()):
            found.append(gone)
    return found


def _groups(messages: Sequence[Message]) -> tuple[list[list[int]], int]:
    """Positions of messages that belong together, oldest first, and that of the last user's message (-1: none)."""
    last_user = max((position for position, message in enumerate(messages) if message["role"] == "user"), default=-1)
    groups: list[list[int]] = []
    for position, message in enumerate(messages):
        if message["role"] == "system":
            continue
        answers = message["role"] == "assistant" and position > last_user
        if message["role"] == "user" or answers or not groups:
            groups.append([])
        groups[-1].append(position)
    return groups, last_user


def _calls(messages: Sequence[Message]) -> dict[int, int]:
    """Where the call stands that each tool result answers. Ids may repeat in a long conversation: the latest counts."""
    latest: dict[Any, int] = {}
    found: dict[int, int] = {}
    for position, message in enumerate(messages):
        for call in message.get("tool_calls") or ():
            latest[call.get("id")] = position
        if message["role"] == "tool" and message.get("tool_call_id") in latest:
            found[position] = latest[message.get("tool_call_id")]
    return found
