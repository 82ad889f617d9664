"""Conversations out of rows: Alpaca, ShareGPT, OpenAI messages, prompt and completion; and plain texts.

The form is known by the columns. A row is checked whole before anything is trained on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from calpaca.core.template import Message
from calpaca_trainer.rows import Fault, Row


@dataclass(frozen=True)
class Conversation:
    """Messages up to and with the last answer, and the functions that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


class _Form(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    def conversation(self) -> Conversation:
        raise NotImplementedError


def _tools(value: Any) -> Any:
    """Functions are given as a list, or as its JSON text."""
    found = json.loads(value) if isinstance(value, str) and value.strip() else value or ()
    return tuple(each if "function" in each else {"type": "function", "function": each} for each in found)


class Alpaca(_Form):
    """`instruction`, `input`, `output`, and the turns before in `history` as pairs of question and answer."""

    instruction: str = Field(min_length=1)
    output: str = Field(min_length=1)
    input: str | None = None
    system: str | None = None
    history: list[tuple[str, str]] | None = None

    def conversation(self) -> Conversation:
        # Chinese-LLaMA-Alpaca's rule: one line break before an input that is there.
        question = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        turns = [*(self.history or ()), (question, self.output)]
        system = [message_of("system", self.system)] if self.system else []
        pairs = (pair for user, answer in turns for pair in (message_of("user", user), message_of("assistant", answer)))
        return Conversation((*system, *pairs))


class Said(BaseModel):
    """A turn of ShareGPT's."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    speaker: Literal["human", "user", "gpt", "assistant", "system", "tool", "observation", "function_call"] = Field(
        alias="from"
    )
    value: str


class ShareGPT(_Form):
    """`conversations` of `from` and `value`."""

    conversations: list[Said]
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = ()

    _read_tools = field_validator("tools", mode="before")(_tools)

    def conversation(self) -> Conversation:
        system = [message_of("system", self.system)] if self.system else []
        return Conversation((*system, *map(said_message, self.conversations)), self.tools)


_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def said_message(said: Said) -> Message:
    """ShareGPT's turn as a message. Raises ValueError for a function call that is no JSON."""
    if said.speaker == "function_call":
        call = {"type": "function", "function": json.loads(said.value)}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    return message_of(_ROLES.get(said.speaker, said.speaker), said.value)


class OpenAIMessage(BaseModel):
    """A message of OpenAI's, of text alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def message(self) -> Message:
        parts = self.content if isinstance(self.content, list) else [{"type": "text", "text": self.content or ""}]
        if any(part.get("type") != "text" for part in parts):
            raise ValueError("a message holds something else than text")
        role = "system" if self.role == "developer" else self.role
        message = message_of(role, "".join(str(part["text"]) for part in parts))
        return {**message, "tool_calls": self.tool_calls} if self.tool_calls else message


class OpenAIMessages(_Form):
    """`messages` of `role` and `content`."""

    messages: list[OpenAIMessage]
    tools: tuple[dict[str, Any], ...] = ()

    _read_tools = field_validator("tools", mode="before")(_tools)

    def conversation(self) -> Conversation:
        return Conversation(tuple(each.message() for each in self.messages), self.tools)


class PromptCompletion(_Form):
    """`prompt` and `completion`: two texts, or two lists of messages."""

    prompt: str | list[OpenAIMessage] = Field(min_length=1)
    completion: str | list[OpenAIMessage] = Field(min_length=1)

    def conversation(self) -> Conversation:
        return Conversation((*messages_of("user", self.prompt), *messages_of("assistant", self.completion)))


def messages_of(role: str, value: str | list[OpenAIMessage]) -> list[Message]:
    """A text as one message of the role, or messages as they are."""
    return [message_of(role, value)] if isinstance(value, str) else [each.message() for each in value]


FORMS: Sequence[tuple[str, frozenset[str], type[_Form]]] = (
    ("messages", frozenset({"messages"}), OpenAIMessages),
    ("ShareGPT", frozenset({"conversations"}), ShareGPT),
    ("Alpaca", frozenset({"instruction", "output"}), Alpaca),
    ("prompt and completion", frozenset({"prompt", "completion"}), PromptCompletion),
)
"""Name, columns that it is known by, and its model."""


def form_of(row: Row) -> str | None:
    """The name of the form that a row has by its columns; `text` for one to pre-train on."""
    for name, columns, _ in FORMS:
        if columns <= row.values.keys():
            return name
    return "text" if "text" in row.values else None


def read_conversation(row: Row) -> Conversation | Fault:
    """The conversation in a row, or what is wrong with it."""
    form = next((model for _, columns, model in FORMS if columns <= row.values.keys()), None)
    if form is None:
        return fault_in(row, f"its columns ({_named(row.values)}) are those of no known form: {_known()}")
    try:
        conversation = form.model_validate(dict(row.values)).conversation()
    except ValidationError as error:
        first = error.errors()[0]
        return fault_in(row, f"{'.'.join(map(str, first['loc'])) or 'row'}: {first['msg']}")
    except (ValueError, KeyError, TypeError) as error:
        return fault_in(row, f"{error}")
    return _to_last_answer(row, conversation)


def read_text(row: Row) -> str | Fault:
    """The text in a row, or what is wrong with it."""
    text = row.values.get("text")
    if not isinstance(text, str):
        return fault_in(row, f"there is no column 'text' with a text, but {_named(row.values)}")
    return text if text.strip() else fault_in(row, "the text is empty")


def _to_last_answer(row: Row, conversation: Conversation) -> Conversation | Fault:
    """Turns after the last answer teach nothing and are left out."""
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return fault_in(row, "no assistant answers in it")
    first = next(message for message in messages if message["role"] != "system")
    if first["role"] == "assistant":
        return fault_in(row, "it begins with an answer")
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            return fault_in(row, "an answer is empty")
    return Conversation(tuple(messages), conversation.tools)


def message_of(role: str, content: str | None) -> Message:
    """A message of text."""
    return {"role": role, "content": content or ""}


def fault_in(row: Row, reason: str) -> Fault:
    """What is wrong with a row."""
    return Fault(row.file, row.line, reason)


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def _known() -> str:
    return "; ".join(f"{name} ({', '.join(sorted(columns))})" for name, columns, _ in FORMS)
