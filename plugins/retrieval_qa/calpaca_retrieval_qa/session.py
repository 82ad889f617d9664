"""Conversations about documents, as sessions of the one store in which chats are kept too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calpaca.core.sessions import Session

_APP = "retrieval_qa"
_SAID = ("user", "assistant")
_KEPT = ("supported", "searched", "strategy", "citations", "sources", "usage", "model")


@dataclass(frozen=True)
class KeptConversation:
    """A session, and the options that its questions are asked with.

    Messages are written as the chat writes those of an app, so that it shows their sources and asks again with the same
    documents.
    """

    session: Session
    options: Mapping[str, Any] = field(default_factory=dict)

    def turns(self) -> list[Mapping[str, str]]:
        """What was asked and answered so far, oldest first."""
        return [{"role": each.role, "content": each.content} for each in self.session.path() if each.role in _SAID]

    def keep(self, question: str, value: Mapping[str, Any]) -> None:
        """Write a question and its answer down, both or neither; the answer with what it rests on.

        Raises SessionError when there is no room for them.
        """
        asked = {"app": {"name": _APP, "options": dict(self.options), "input": question}}
        told = {"app": _APP, **{name: value[name] for name in _KEPT if name in value}}
        self.session.extend([("user", question, asked), ("assistant", value["answer"], told)])
