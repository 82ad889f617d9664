"""What is known so far of an answer under way, and the result that it becomes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from calpaca.core.context import ContextUse
from calpaca.core.engine import Usage
from calpaca.core.events import Source
from calpaca_retrieval_qa.citations import CitedAnswer
from calpaca_retrieval_qa.history import History


@dataclass
class AnswerRecord:
    """An answer under way.

    `standalone` is the question as the model is asked it, `searched` what was looked up for it. `steps` are the texts of
    the model, `text` what is shown of them, `passages` what the model read.
    """

    question: str
    model: str
    history: History
    strategy: str
    started: float = field(default_factory=time.monotonic)
    rewritten: str = ""
    searched: str = ""
    supported: bool = True
    steps: list[str] = field(default_factory=list)
    text: str = ""
    passages: list[Source] = field(default_factory=list)
    cited: CitedAnswer | None = None
    context: ContextUse | None = None
    notices: list[str] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def standalone(self) -> str:
        return self.rewritten or self.question

    def mark(self, name: str) -> None:
        """Note the seconds since the question came."""
        self.timings.setdefault(name, round(time.monotonic() - self.started, 3))

    def count(self, message: BaseMessage | None) -> int:
        """Add the tokens of a model call; returns those of its prompt."""
        used = message.usage_metadata if isinstance(message, AIMessage) else None
        if not used:
            return 0
        self.usage += Usage(used["input_tokens"], used["output_tokens"])
        return used["input_tokens"]

    def sources(self) -> Sequence[Source]:
        """What is listed under the answer: the words that are cited, else the passages that the model read."""
        if self.cited is not None and self.cited.citations:
            return [citation.as_source() for citation in self.cited.citations]
        return self.passages

    def value(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        self.mark("total")
        steps = {"intermediate_steps": self.steps} if self.strategy != "stuff" else {}
        return {
            "answer": self.text.strip(),
            "supported": self.supported,
            "strategy": self.strategy,
            "searched": self.searched,
            "sources": [_as_json(source) for source in self.passages],
            **(self.cited.as_dict() if self.cited is not None else {}),
            **steps,
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "completion_tokens": self.usage.completion_tokens,
                "total_tokens": self.usage.total_tokens,
            },
            **({"context": self.context.as_dict()} if self.context is not None else {}),
            "timings": self.timings,
            "model": self.model,
            "notices": self.notices,
        }


def _as_json(source: Source) -> dict[str, Any]:
    offsets = {
        name: source.metadata[key]
        for name, key in (("start_offset", "start"), ("end_offset", "end"))
        if key in source.metadata
    }
    reranked = {"rerank": source.metadata["rerank"]} if "rerank" in source.metadata else {}
    return {
        "source": source.source,
        "page": source.page,
        "start": source.start,
        "end": source.end,
        "text": source.text,
        "score": source.score,
        **reranked,
        **offsets,
    }
