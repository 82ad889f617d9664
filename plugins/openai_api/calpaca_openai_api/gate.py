"""What every request passes: an id, keys, bounds of its body, the access log and the metrics. Plain ASGI."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calpaca_openai_api.answering import CLIENT_GONE
from calpaca_openai_api.faults import ApiError, as_api_error
from calpaca_openai_api.keys import Keys, refuse_path
from calpaca_openai_api.metrics import Metrics
from calpaca_openai_api.rates import Rates
from calpaca_openai_api.record import Record
from calpaca_openai_api.settings import is_loopback
from calpaca_openai_api.wire import Json

access = logging.getLogger("calpaca.access")

_OPEN = frozenset({"/health", "/ready", "/docs", "/openapi.json"})
"""Paths that need no key."""

_DISCARDED = 64 << 20
"""Bytes of a body that is too long which are read, so that its sender gets to see the answer."""

_BODY_SECONDS = 60.0


@dataclass(frozen=True)
class Gate:
    """Stands before the app. `local_only`: only requests that name this machine as their host, since a web page can make
    a browser send others."""

    app: ASGIApp
    keys: Keys
    metrics: Metrics
    max_body: int
    local_only: bool = False
    rates: Rates = field(default_factory=Rates)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(scope["method"], scope["path"])
        limits: dict[str, str] = {}
        scope.setdefault("state", {})["record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message).update({**limits, "x-request-id": record.id})
            await send(message)

        try:
            limits |= self._enter(scope, record)
            await self._pass(scope, receive, send_with_id)
        except Exception as error:
            if record.status == 0:  # else the app has answered already, or a stream is broken off
                fault = as_api_error(error)
                record.blame(fault)
                await Json(fault.body(), fault.status, fault.headers)(scope, receive, send_with_id)
        finally:
            if record.work is None:
                self._note(record)
            else:
                record.work.add_done_callback(lambda _: self._note(record))

    def _enter(self, scope: Scope, record: Record) -> dict[str, str]:
        """Check host and key, and count the request; the headers that tell what is left. Raises ApiError."""
        headers = Headers(scope=scope)
        if self.local_only and not is_loopback(_host(headers.get("host", ""))):
            raise ApiError(403, "This server answers to requests for localhost only.", code="host_not_allowed")
        if scope["path"] not in _OPEN:
            record.key_name, record.key = self.keys.find(headers.get("authorization"))
            refuse_path(record.key, scope["path"])
        return self.rates.enter(record.key_name, record.key) if scope["method"] == "POST" else {}

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["method"] == "POST":
            if _has_body(headers):
                _check_type(headers.get("content-type", ""))
            receive = await self._with_body(receive, headers)
        await self.app(scope, receive, send)

    async def _with_body(self, receive: Receive, headers: Headers) -> Receive:
        """A `receive` that gives the whole body at once. Raises ApiError 413 or 408."""
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_body + _DISCARDED:
            raise self._too_long()
        body = bytearray()
        length = 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                more = True
                while more and length <= self.max_body + _DISCARDED:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLIENT_GONE, "The client has gone.")
                    part = message.get("body", b"")
                    length += len(part)
                    if length <= self.max_body:
                        body += part
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"The request did not come within {_BODY_SECONDS:g} s.", code="timeout") from None
        if length > self.max_body:
            raise self._too_long()
        return _replay(bytes(body), receive)

    def _too_long(self) -> ApiError:
        return ApiError(413, f"The request is longer than {self.max_body} bytes.", code="request_too_large")

    def _note(self, record: Record) -> None:
        access.info("%s", json.dumps(record.line()))
        path = _label(record)
        self.metrics.requests.labels(path, record.model, record.key_name, record.status).inc()
        self.metrics.duration.labels(path).observe(record.line()["seconds"])
        if record.first is not None:
            self.metrics.first_token.labels(record.model).observe(record.first)
        if record.usage is not None:
            self.rates.spend(record.key_name, record.key, record.usage.total_tokens)
            self.metrics.prompt_tokens.labels(record.model, record.key_name).inc(record.usage.prompt_tokens)
            if record.speed is not None:
                self.metrics.speed.labels(record.model).observe(record.speed)
            self.metrics.completion_tokens.labels(record.model, record.key_name).inc(record.usage.completion_tokens)


def _label(record: Record) -> str:
    """The path in metrics, which must stay few."""
    if record.status in (404, 405):
        return "other"
    return "/v1/responses/{id}" if record.path.startswith("/v1/responses/") else record.path


def _host(header: str) -> str:
    """The host of a Host header, without its port."""
    return header.partition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _check_type(content_type: str) -> None:
    """Raise ApiError 415 for anything but JSON: a web page can send other types to any server unasked."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The request must be of type application/json.", code="unsupported_media_type")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already, and then whatever comes."""
    given: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return given.pop() if given else await receive()

    return again
