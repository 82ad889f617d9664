"""Conversations about documents, as sessions of the one store in which chats are kept too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calpaca.core.sessions import Session

_SAID = ("user", "assistant")
_KEPT = ("supported", "searched", "strategy", "citations", "sources", "usage", "model")


def turns_of(session: Session) -> list[Mapping[str, str]]:
    """What was asked and answered so far, oldest first."""
    return [{"role": each.role, "content": each.content} for each in session.path() if each.role in _SAID]


def keep(session: Session, question: str, value: Mapping[str, Any]) -> None:
    """Write a question and its answer down, both or neither; the answer with what it rests on.

    Raises SessionError when there is no room for them.
    """
    told = {name: value[name] for name in _KEPT if name in value}
    session.extend([("user", question, {}), ("assistant", value["answer"], {"app": "retrieval_qa", **told})])
