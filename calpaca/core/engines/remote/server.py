"""What a server says about itself and its models, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from calpaca.core.engine import Conversation
from calpaca.core.engines.remote.address import Address
from calpaca.core.engines.remote.client import read_bounded, reason
from calpaca.core.engines.remote.dialect import Dialect, find_dialect
from calpaca.core.engines.remote.estimate import plain_messages
from calpaca.core.engines.remote.refusal import Asked, PassingError, refusal
from calpaca.core.errors import ModelError, ModelNotFoundError

_PATIENCE = 10.0
"""Seconds for a question that a server answers at once."""


@dataclass(frozen=True)
class ServedModel:
    """A model in a server's list. What the server does not tell is None."""

    id: str
    owner: str | None = None
    context_length: int | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Server:
    """A server that answers; `models` is empty where it gives no list."""

    address: Address
    dialect: Dialect
    models: Mapping[str, ServedModel] = field(default_factory=dict)


async def ask(client: httpx.AsyncClient, url: str, asked: Asked, body: Mapping[str, Any] | None = None) -> Any:
    """A small JSON answer. Raises PassingError when the server cannot be reached or is not ready, else CalpacaError."""
    try:
        try:
            content = await _fetch(client, url, asked, body)
        except (httpx.RemoteProtocolError, httpx.ReadError):  # it closed a kept connection; asking again is harmless
            content = await _fetch(client, url, asked, body)
        return httpx.Response(200, content=content).json()
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise PassingError(reason(error)) from error
    except ValueError as error:
        raise ModelError(f"{asked.where} answers, but not with JSON.", "Does its address end with /v1?") from error


async def _fetch(client: httpx.AsyncClient, url: str, asked: Asked, body: Mapping[str, Any] | None) -> bytes:
    async with client.stream("GET" if body is None else "POST", url, json=body, timeout=_PATIENCE) as response:
        content = await read_bounded(response)
        if response.status_code != httpx.codes.OK:
            raise refusal(response.status_code, response.headers, content, asked)
        return content


async def describe(client: httpx.AsyncClient, address: Address, kind: str, secret: str | None) -> Server:
    """Ask a server for its list of models. One that gives no list (404) is taken for a plain one."""
    listed: Any = {}
    asked = Asked(address.shown, {}, find_dialect(kind, None), secret)
    with suppress(ModelNotFoundError):
        listed = await ask(client, f"{address.url}/models", asked)
    entries = listed.get("data") if isinstance(listed, dict) else None
    models = [_served(entry) for entry in entries or () if isinstance(entry, dict) and entry.get("id")]
    owner = models[0].owner if models else None
    return Server(address, find_dialect(kind, owner), {model.id: model for model in models})


def _served(entry: Mapping[str, Any]) -> ServedModel:
    meta = entry.get("meta") or {}
    length = entry.get("max_model_len") or meta.get("n_ctx")
    owner, fingerprint = entry.get("owned_by"), entry.get("fingerprint")
    return ServedModel(
        str(entry["id"]),
        str(owner) if owner else None,
        int(length) if length else None,
        str(fingerprint) if fingerprint else None,
    )


class RemoteTokenizer:
    """Text to token ids and back by a server of vLLM's or llama.cpp's kind."""

    def __init__(self, client: httpx.AsyncClient, model: str, dialect: Dialect, secret: str | None) -> None:
        self._client = client
        self._model = model
        self._dialect = dialect
        self._secret = secret

    async def encode(self, address: Address, text: str, *, special_tokens: bool) -> list[int]:
        if self._is_llama_cpp:
            body = {"content": text, "add_special": special_tokens, "parse_special": True}
        else:
            body = {"model": self._model, "prompt": text, "add_special_tokens": special_tokens}
        return [int(token) for token in (await self._ask(address, "/tokenize", body))["tokens"]]

    async def decode(self, address: Address, token_ids: list[int]) -> str:
        body = {"tokens": token_ids} if self._is_llama_cpp else {"model": self._model, "tokens": token_ids}
        answer = await self._ask(address, "/detokenize", body)
        return str(answer["content" if self._is_llama_cpp else "prompt"])

    async def count(self, address: Address, conversation: Conversation) -> int:
        """Tokens of a conversation as the server renders it."""
        messages = plain_messages(conversation)
        if self._is_llama_cpp:
            prompt = (await self._ask(address, "/apply-template", {"messages": messages}))["prompt"]
            return len(await self.encode(address, prompt, special_tokens=True))
        body = {"model": self._model, "messages": messages, "add_generation_prompt": True}
        return int((await self._ask(address, "/tokenize", body))["count"])

    @property
    def _is_llama_cpp(self) -> bool:
        return self._dialect.name == "llama_cpp"

    async def _ask(self, address: Address, path: str, body: Mapping[str, Any]) -> Any:
        try:
            return await ask(
                self._client, address.root + path, Asked(address.shown, body, self._dialect, self._secret), body
            )
        except PassingError as error:
            raise ModelError(
                f"The server {address.shown} does not count tokens now: {error.reason}.", "Try again."
            ) from error
