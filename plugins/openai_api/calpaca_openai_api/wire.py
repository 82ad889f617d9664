"""What responses have in common: ids, usage, server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from calpaca.core.engine import Usage

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Envelope:
    """The fields that every chunk of a response repeats."""

    prefix: str
    model: str
    fingerprint: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def fields(self, kind: str) -> dict[str, Any]:
        fields = {"id": f"{self.prefix}-{self.token}", "object": kind, "created": self.created, "model": self.model}
        return fields if self.fingerprint is None else {**fields, "system_fingerprint": self.fingerprint}


def usage_fields(usage: Usage) -> dict[str, Any]:
    """OpenAI's CompletionUsage; `estimated` is added where the engine could not count."""
    fields: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
    return {**fields, "estimated": True} if usage.estimated else fields


class Json(Response):
    """A JSON response. Text that is no Unicode, as a client may have sent it, is shown with question marks."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return _encoded(content)


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event; data with a type of its own goes under that name too."""
    name = f"event: {data['type']}\n".encode() if "type" in data else b""
    return name + b"data: " + _encoded(data) + b"\n\n"


def _encoded(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
