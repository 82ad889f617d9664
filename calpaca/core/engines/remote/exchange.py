"""One request to a server and its streamed answer, tried again as long as no piece of the answer has come."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from calpaca.core.engine import Chunk, Handle, Request, Timings
from calpaca.core.engines.remote.answer import DONE, AnswerReader
from calpaca.core.engines.remote.client import read_bounded, reason, silent
from calpaca.core.engines.remote.dialect import Dialect
from calpaca.core.engines.remote.endpoints import Endpoint, Endpoints, backoff
from calpaca.core.engines.remote.estimate import estimated_prompt, estimated_tokens
from calpaca.core.engines.remote.refusal import Asked, PassingError, refusal
from calpaca.core.engines.remote.sse import EventReader
from calpaca.core.errors import ModelError, UnsupportedError

log = logging.getLogger("calpaca")

_LONGEST_WAIT = 120.0
"""Seconds that a server may ask to be left alone before its request fails."""
_AFTER_DONE = 1.0


@dataclass(frozen=True)
class Route:
    """How requests go out: to which servers, in which dialect, with what patience."""

    client: httpx.AsyncClient
    endpoints: Endpoints
    dialect: Dialect
    retries: int
    timeout: float
    secret: str | None = field(default=None, repr=False)


@dataclass
class Exchange:
    """One request under way. `path` lies below a server's address; `body` is what is sent there."""

    request: Request
    path: str
    body: dict[str, Any]
    handle: Handle
    reader: AnswerReader
    submitted: float = field(default_factory=time.perf_counter)
    first: float | None = None
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def end(self, *, cancelled: bool = False) -> None:
        """Give the reader the last chunk."""
        now = time.perf_counter()
        self.handle.put(
            Chunk(
                "",
                finish_reason="cancelled" if cancelled else self.reader.finish,
                stop=None if cancelled else self.reader.stop,
                usage=self.reader.usage(self._prompt_estimate()),
                timings=Timings((self.first or now) - self.submitted, now - self.submitted),
            )
        )

    def _prompt_estimate(self) -> int:
        prompt = self.request.prompt
        if self.request.conversation is not None:
            return estimated_prompt(self.request.conversation)
        return estimated_tokens(prompt) if isinstance(prompt, str) else len(prompt)

    async def send(self, route: Route) -> None:
        """Ask one server after the other, until one answers. Raises CalpacaError."""
        for attempt in range(1, route.retries + 2):
            try:
                with route.endpoints.next() as endpoint:
                    await self._ask(endpoint, route)
            except PassingError as error:
                shown = endpoint.address.shown
                route.endpoints.failed(endpoint, error.wait)
                if attempt > route.retries or (error.wait or 0.0) > _LONGEST_WAIT:
                    raise _given_up(shown, attempt, error) from error
                log.debug("%s: %s; try %s failed", shown, error.reason, attempt)
                if not route.endpoints.awake():
                    await asyncio.sleep(backoff(attempt) if error.wait is None else error.wait)
            else:
                route.endpoints.answered(endpoint)
                self._check_grammar()
                return

    async def _ask(self, endpoint: Endpoint, route: Route) -> None:
        """One try. Raises PassingError when another may succeed, CalpacaError otherwise."""
        shown = endpoint.address.shown
        try:
            async with route.client.stream("POST", endpoint.address.url + self.path, json=self.body) as response:
                if response.status_code != httpx.codes.OK:
                    asked = Asked(shown, self.body, route.dialect, route.secret)
                    raise refusal(response.status_code, response.headers, await read_bounded(response), asked)
                await self._read(response)
        except httpx.ReadTimeout as error:
            raise silent(shown, route.timeout) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            if self.first is None:
                raise PassingError(reason(error)) from error
            if self.reader.finish is None:
                raise _broken_off(shown) from error
        if self.reader.finish is None:
            raise _broken_off(shown)

    async def _read(self, response: httpx.Response) -> None:
        """Give the reader the pieces as they come."""
        events = EventReader()
        received = response.aiter_bytes()
        async for data in received:
            for event in events.feed(data):
                if event == DONE:
                    # The connection can be used again only if its end is read.
                    with suppress(TimeoutError, httpx.HTTPError):
                        async with asyncio.timeout(_AFTER_DONE):
                            async for _ in received:
                                pass
                    return
                chunk = self.reader.read(event)
                if chunk is not None:
                    self.first = self.first or time.perf_counter()
                    self.handle.put(chunk)
                if self.reader.stopped:
                    return

    def _check_grammar(self) -> None:
        """A server that does not know a field ignores it in silence; a text that breaks its grammar shows that."""
        grammar = self.request.grammar
        if grammar is None or self.reader.finish != "stop" or self.request.sampling.stop:
            return
        holds = True
        if grammar.kind == "json_schema":
            holds = _is_json(self.reader.text)
        else:
            with suppress(re.error):  # another syntax than Python's
                holds = re.fullmatch(str(grammar.value), self.reader.text, re.DOTALL) is not None
        if not holds:
            raise UnsupportedError(
                f"The server did not keep to the {grammar.kind.replace('_', ' ')}.",
                "Another version of it may; --engine transformers does.",
            )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _given_up(shown: str, attempts: int, error: PassingError) -> ModelError:
    tries = f" after {attempts} tries" if attempts > 1 else ""
    wait = f" It asks for {error.wait:g} s of patience." if error.wait else ""
    return ModelError(
        f"The server {shown} cannot answer{tries}: {error.reason}.{wait}", "Is it running? Try again later."
    )


def _broken_off(shown: str) -> ModelError:
    return ModelError(
        f"The answer of the server {shown} broke off before its end; what came is not whole.",
        "Look at the server's own log, and try again.",
    )
