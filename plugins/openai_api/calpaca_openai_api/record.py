"""What is known about a request under way: for the access log and the metrics."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from calpaca.core.engine import Usage
from calpaca_openai_api.faults import ApiError
from calpaca_openai_api.settings import KeySettings


@dataclass
class Record:
    """One request. `key_name` is the name of the key that was shown; `model` the id of the model that answers; `work`
    what goes on when the request has been answered."""

    method: str
    path: str
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    key_name: str = ""
    key: KeySettings | None = None
    model: str = ""
    status: int = 0
    streamed: bool = False
    usage: Usage | None = None
    error: str | None = None
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    work: asyncio.Task[None] | None = None

    def mark_first(self) -> None:
        """Note when the first piece of the answer came."""
        if self.first is None:
            self.first = time.monotonic() - self.started

    def blame(self, fault: ApiError) -> None:
        """Note what went wrong."""
        self.error = fault.code or fault.message

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first piece; None for an answer of fewer than two, or that is not streamed."""
        seconds = time.monotonic() - self.started - (self.first or 0.0)
        if self.usage is None or self.first is None or self.usage.completion_tokens < 2 or seconds <= 0:
            return None
        return (self.usage.completion_tokens - 1) / seconds

    def line(self) -> dict[str, Any]:
        """The access log's line: no text of request or answer is in it."""
        line: dict[str, Any] = {
            "request": self.id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.monotonic() - self.started, 4),
        }
        if self.first is not None:
            line["first_token"] = round(self.first, 4)
        if self.usage is not None:
            line |= {"prompt_tokens": self.usage.prompt_tokens, "completion_tokens": self.usage.completion_tokens}
        shown = {"model": self.model, "key": self.key_name, "error": self.error, "stream": self.streamed}
        return line | {name: value for name, value in shown.items() if value}


def record_of(request: Request) -> Record:
    """The record that the gate has made for a request."""
    record: Record = request.state.record
    return record
