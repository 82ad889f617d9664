"""Preferences out of rows: two answers of which one is better, or one that is good or bad.

The form is known by the columns: `prompt`, `chosen` and `rejected`, or `conversations` with both (ShareGPT's), for DPO;
`prompt`, `completion` and `label`, or `messages` and `label`, for KTO. A text is one message; lists of messages may hold the
whole conversation, whose last message is the answer then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from calpaca.core.template import Message
from calpaca_trainer.conversation import (
    Conversation,
    OpenAIMessage,
    Said,
    fault_in,
    message_of,
    messages_of,
    said_message,
)
from calpaca_trainer.rows import Fault, Row

Turns = str | list[OpenAIMessage]


@dataclass(frozen=True)
class Preference:
    """What was asked, and a better and a worse answer, of which one may be None."""

    prompt: tuple[Message, ...]
    chosen: Message | None
    rejected: Message | None

    @property
    def is_pair(self) -> bool:
        return self.chosen is not None and self.rejected is not None

    def conversations(self) -> tuple[Conversation, ...]:
        """The prompt with each answer that there is, the better one first."""
        return tuple(Conversation((*self.prompt, each)) for each in (self.chosen, self.rejected) if each is not None)


class _Form(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    def preference(self) -> Preference:
        raise NotImplementedError


class Pair(_Form):
    """`prompt`, `chosen` and `rejected`."""

    prompt: Turns = ""
    chosen: Turns
    rejected: Turns

    def preference(self) -> Preference:
        asked = messages_of("user", self.prompt) if self.prompt else []
        better, chosen = _split(self.chosen, asked)
        worse, rejected = _split(self.rejected, asked)
        if better != worse:
            raise ValueError("both answers must be to the same prompt")
        return Preference(better, chosen, rejected)


def _split(turns: Turns, asked: Sequence[Message]) -> tuple[tuple[Message, ...], Message]:
    """Prompt and answer: messages may repeat the prompt."""
    *before, answer = messages_of("assistant", turns) or [message_of("assistant", "")]
    return tuple(before or asked), answer


class SharedPair(_Form):
    """`conversations` of `from` and `value`, with `chosen` and `rejected` as two more turns (LLaMA-Factory's)."""

    conversations: list[Said]
    chosen: Said
    rejected: Said
    system: str | None = None

    def preference(self) -> Preference:
        system = [message_of("system", self.system)] if self.system else []
        prompt = (*system, *map(said_message, self.conversations))
        return Preference(prompt, said_message(self.chosen), said_message(self.rejected))


class Rated(_Form):
    """`prompt` and `completion`, with a `label`: true for a good answer."""

    prompt: Turns
    completion: Turns
    label: bool

    def preference(self) -> Preference:
        return _rated(*_split(self.completion, messages_of("user", self.prompt)), good=self.label)


class RatedMessages(_Form):
    """`messages` up to an answer, with a `label`."""

    messages: list[OpenAIMessage]
    label: bool

    def preference(self) -> Preference:
        return _rated(*_split(self.messages, ()), good=self.label)


def _rated(prompt: tuple[Message, ...], answer: Message, *, good: bool) -> Preference:
    return Preference(prompt, answer if good else None, None if good else answer)


FORMS: Sequence[tuple[frozenset[str], type[_Form]]] = (
    (frozenset({"conversations", "chosen", "rejected"}), SharedPair),
    (frozenset({"chosen", "rejected"}), Pair),
    (frozenset({"prompt", "completion", "label"}), Rated),
    (frozenset({"messages", "label"}), RatedMessages),
)
"""Columns that a form is known by, and its model."""


def read_preference(row: Row) -> Preference | Fault:
    """The preference in a row, or what is wrong with it."""
    form = next((model for columns, model in FORMS if columns <= row.values.keys()), None)
    if form is None:
        named = ", ".join(map(str, row.values)) or "none"
        known = "; ".join(", ".join(sorted(columns)) for columns, _ in FORMS)
        return fault_in(row, f"its columns ({named}) are those of no preference: {known}")
    try:
        preference = form.model_validate(dict(row.values)).preference()
    except ValidationError as error:
        first = error.errors()[0]
        return fault_in(row, f"{'.'.join(map(str, first['loc'])) or 'row'}: {first['msg']}")
    except (ValueError, KeyError, TypeError) as error:
        return fault_in(row, f"{error}")
    reason = _wrong(preference)
    return preference if reason is None else fault_in(row, reason)


def _wrong(preference: Preference) -> str | None:
    answers = [each for each in (preference.chosen, preference.rejected) if each is not None]
    if not preference.prompt or preference.prompt[-1]["role"] not in {"user", "tool"}:
        return "nothing is asked before the answer"
    if any(answer["role"] != "assistant" for answer in answers):
        return "an answer is not the assistant's"
    if any(not str(answer["content"]).strip() for answer in answers):
        return "an answer is empty"
    if preference.is_pair and answers[0] == answers[1]:
        return "both answers are the same"
    return None
