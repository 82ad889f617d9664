"""A server's refusal or failure, as an error that a person can act on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from calpaca.core.engines.remote.answer import said
from calpaca.core.engines.remote.dialect import Dialect, wire_name
from calpaca.core.errors import CalpacaError, ContextOverflowError, ModelError, ModelNotFoundError, UnsupportedError

_PASSING = frozenset({429, 502, 503, 504})
"""Answers after which the same request may succeed a little later."""

_CONTEXT = re.compile(r"context (?:length|size|window)\D{0,40}?(\d+)|\((\d+) tokens\), try increasing", re.IGNORECASE)
_PROMPT = re.compile(
    r"(\d+) (?:tokens )?(?:in the messages|in the prompt|input tokens)|(?:request|prompt) \((\d+) tokens\)",
    re.IGNORECASE,
)
_TEXT = re.compile(r"<[^>]*>")


class PassingError(Exception):
    """The server cannot answer now. `wait`: seconds after which it wants to be asked again, where it says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


@dataclass(frozen=True)
class Asked:
    """What a refused request asked for, and whom."""

    where: str
    body: Mapping[str, Any]
    dialect: Dialect
    secret: str | None = None


def refusal(status: int, headers: Mapping[str, str], content: bytes, asked: Asked) -> CalpacaError | PassingError:
    """The error for an answer that is not 200."""
    body = _parse(content)
    message = " ".join(said(body).split())[:400].rstrip(".") or "it says nothing"
    if asked.secret:
        message = message.replace(asked.secret, "…")
    if status in _PASSING:
        return PassingError(f"answered {status}: {message}", _retry_after(headers.get("retry-after")))
    if status in (401, 403):
        return ModelError(
            f"The server {asked.where} refuses the key: {message}.",
            "Set CALPACA_API_KEY, or api_key_file in [remote], to a key that it knows.",
        )
    if 300 <= status < 400:
        return ModelError(f"{asked.where} leads on to {headers.get('location')}.", "Name that address instead.")
    if status in (400, 413, 422):
        return _overflow(body, message, asked) or _wrong_field(body, message, asked)
    if status == 404:
        return ModelNotFoundError(
            f"The server {asked.where} does not know the model '{asked.body.get('model')}', or does not offer this: "
            f"{message}.",
            "Check the name after '#', and that the address ends with /v1.",
        )
    return ModelError(f"The server {asked.where} failed with {status}: {message}.", "Look at the server's own log.")


def _parse(content: bytes) -> Any:
    text = content.decode(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return _TEXT.sub(" ", text)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or an HTTP date."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max((until - datetime.now(UTC)).total_seconds(), 0.0) if until.tzinfo else None


def _overflow(body: Any, message: str, asked: Asked) -> ContextOverflowError | None:
    """The error for a prompt that is too long, if that is what the message says and it gives numbers."""
    error = body.get("error") if isinstance(body, dict) else None
    given = error if isinstance(error, dict) else {}
    context, prompt = given.get("n_ctx"), given.get("n_prompt_tokens")
    if context is None or prompt is None:
        found_context, found_prompt = _CONTEXT.search(message), _PROMPT.search(message)
        if found_context is None or found_prompt is None:
            return None
        context, prompt = (next(filter(None, found.groups())) for found in (found_context, found_prompt))
    return ContextOverflowError(int(prompt), int(asked.body.get("max_tokens") or 1), int(context))


def _wrong_field(body: Any, message: str, asked: Asked) -> UnsupportedError:
    """The error that names the field which the server does not take."""
    name = _field(body, message, asked.body)
    flag = wire_name(name, asked.dialect) if name else ""
    named = f" because of '{name}'" if name else ""
    hint = f"Leave out {flag or 'what it names'}, or use --engine transformers." if name else "See what it says."
    return UnsupportedError(f"The server {asked.where} refuses the request{named}: {message}.", hint)


def _field(body: Any, message: str, sent: Mapping[str, Any]) -> str | None:
    """Which of the fields that were sent an error is about."""
    match body:
        case {"error": {"param": str(name)}} | {"param": str(name)}:
            return name
        case {"detail": [{"loc": [*_, str(name)]}, *_]}:
            return name
    return next((name for name in sorted(sent, key=len, reverse=True) if re.search(rf"\b{name}\b", message)), None)
