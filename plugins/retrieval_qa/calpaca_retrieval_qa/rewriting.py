"""Follow-up questions rewritten so that they can be understood alone.

"And when was it built?" finds nothing. The model is asked for the question with its references filled in from the turns
before, and the result is checked: it must be a question that refers to nothing, keep most of the follow-up's own words,
and bring in no word that neither the follow-up nor the turns have. A rewriting that fails is not used; then the follow-up is looked up together
with the question before it, and the model is shown the turns. A question that refers to nothing before it is left as it
is: turns that have nothing to do with it only lead a small model astray.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig

from calpaca.core.language import language_of
from calpaca_retrieval_qa.facts import Statements, facts
from calpaca_retrieval_qa.history import History

_KEPT = 0.5
_QUESTION_MARKS = ("?", "？")
_LONGEST = 400
"""Characters of a question."""


_REFERS = re.compile(
    r"\b(it|its|he|him|his|she|her|hers|they|them|their|theirs|this|that|these|those|there|one|ones|same|former|latter"
    r"|other|others|another|else)\b|^\W*(and|but|or|so|then|why|what about|how about)\b",
    re.IGNORECASE,
)
_HAN_REFERS = re.compile("[它他她其此该]|[这那]|^(还有|那么|为什么|另外)|呢[？?]?$")
_FEWEST_FACTS = 2
"""Content words below which a question asks for nothing by itself; twice as many Chinese characters."""


@dataclass(frozen=True)
class Rewriting:
    """A question in full, or why the model's was not used."""

    question: str = ""
    reason: str = ""
    message: BaseMessage | None = None


def rewrite(
    llm: Any, prompt: ChatPromptTemplate, history: History, question: str, config: RunnableConfig | None = None
) -> Rewriting:
    """Ask the model for `question` in full, and check what it says."""
    turns = "\n".join(f"{'Q' if message.type == 'human' else 'A'}: {message.text}" for message in history.messages)
    reply = llm.invoke(prompt.invoke({"history": turns, "question": question}), config, stop=["\n"])
    text = (reply if isinstance(reply, str) else str(reply.text)).strip().strip('"“”')
    message = reply if isinstance(reply, BaseMessage) else None
    reason = fault(text, question, turns)
    return Rewriting("" if reason else text, reason, message)


def stands_alone(question: str) -> bool:
    """Whether a question can be understood without the turns before it, as far as its words tell."""
    if language_of(question) == "zh":
        return not _HAN_REFERS.search(question) and len(facts(question)) >= 2 * _FEWEST_FACTS
    return not _REFERS.search(question) and len(facts(question)) >= _FEWEST_FACTS


def fault(text: str, question: str, turns: str) -> str:
    """What is wrong with a rewriting; empty where nothing is."""
    if not text.endswith(_QUESTION_MARKS) or len(text) > _LONGEST:
        return "it is no question"
    if not stands_alone(text):
        return "it still refers to something before it"
    own, new = facts(question), facts(text)
    if own and len(Statements(text).held(own)) < _KEPT * len(own):
        return "it asks for something else"
    known = Statements(f"{question}\n{turns}")
    if any(fact not in known for fact in new):
        return "it brings in something new"
    return ""
