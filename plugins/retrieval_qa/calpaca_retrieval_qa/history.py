"""The earlier turns of a conversation, to which a follow-up question refers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.prompt_values import ChatPromptValue
from langchain_core.prompts import ChatPromptTemplate

from calpaca_retrieval_qa.budget import context_length, count_tokens
from calpaca_retrieval_qa.citations import without_markers

_SHARE = 4
"""The turns take at most one part in so many of the context; the rest is for passages and the answer."""


@dataclass(frozen=True)
class History:
    """The turns that the model is shown, oldest first, and how many older ones found no room."""

    messages: tuple[BaseMessage, ...] = ()
    left_out: int = 0

    def searches(self, question: str) -> list[str]:
        """What is looked up, until something is found.

        A follow-up question says little without the question before it; one about something new stands alone.
        """
        asked = [str(message.text) for message in self.messages if isinstance(message, HumanMessage)]
        return [f"{asked[-1]}\n{question}", question] if asked else [question]

    def before(self, prompt: ChatPromptTemplate) -> ChatPromptTemplate:
        """A prompt with the turns between its system message and its question."""
        return ChatPromptTemplate([*prompt.messages[:-1], *self.messages, prompt.messages[-1]])


def fit_history(llm: Any, turns: Sequence[Mapping[str, str]]) -> History:
    """The newest turns that fit into their share of the model's context; the first one shown is the user's."""
    limit = context_length(llm)
    kept: list[BaseMessage] = []
    for message in map(_message, reversed(turns)):
        if limit is not None and count_tokens(llm, ChatPromptValue(messages=[message, *kept])) > limit // _SHARE:
            break
        kept.insert(0, message)
    while kept and not isinstance(kept[0], HumanMessage):
        del kept[0]
    return History(tuple(kept), len(turns) - len(kept))


def _message(turn: Mapping[str, str]) -> BaseMessage:
    if turn["role"] == "user":
        return HumanMessage(turn["content"])
    return AIMessage(without_markers(turn["content"])[0])  # the marks of citations are ours, not for a model to imitate
