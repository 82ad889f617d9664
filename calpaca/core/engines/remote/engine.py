"""The remote engine: any OpenAI-compatible server, or several that offer the same models.

The server renders chats and counts tokens; calpaca sends messages and text. A loop in one thread asks; every request is
a task there, and cancelling it closes its connection.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx

from calpaca.core.engine import (
    Capabilities,
    Chunk,
    Conversation,
    Handle,
    Request,
    Timings,
    refuse_unsupported,
)
from calpaca.core.engines.remote.address import Address, find_servers, read_api_key
from calpaca.core.engines.remote.answer import DONE, AnswerReader
from calpaca.core.engines.remote.client import async_client, read_bounded, reason, silent
from calpaca.core.engines.remote.dialect import Dialect, write_request
from calpaca.core.engines.remote.endpoints import Endpoint, Endpoints, backoff
from calpaca.core.engines.remote.estimate import estimated_prompt, estimated_tokens, most_tokens
from calpaca.core.engines.remote.loop import LoopThread
from calpaca.core.engines.remote.refusal import Asked, PassingError, refusal
from calpaca.core.engines.remote.server import RemoteTokenizer, ServedModel, Server, describe
from calpaca.core.engines.remote.sse import EventReader
from calpaca.core.errors import (
    CalpacaError,
    ContextOverflowError,
    ModelError,
    ModelNotFoundError,
    UnsupportedError,
    UsageError,
    unknown_name,
)
from calpaca.core.settings import RemoteSettings
from calpaca.core.spec import ModelSpec
from calpaca.core.template import ChatTemplate

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime

log = logging.getLogger("calpaca")

DEFAULT_NEW_TOKENS = 512
_LONGEST_WAIT = 120.0
"""Seconds that a server may ask to be left alone before its request fails."""
_AFTER_DONE = 1.0

_LOCAL_FIELDS = ("adapters", "tokenizer", "chat_template", "quantization", "revision", "trust_remote_code")


def open_engine(spec: ModelSpec, runtime: Runtime) -> RemoteEngine:
    """Ask the servers that the spec or the settings name. Raises UsageError, UnsupportedError or ModelError."""
    given = spec.model_dump(exclude_defaults=True)
    for name in (*_LOCAL_FIELDS, "device", "dtype"):
        if name in given:
            raise UnsupportedError(
                f"The engine 'remote' cannot decide the {name.replace('_', ' ')}: the server has loaded its model.",
                "Leave it out; an adapter that the server offers is a model of its own there.",
            )
    settings = runtime.settings.remote
    addresses, model = find_servers(spec.model, settings)
    return RemoteEngine(addresses, model, settings, read_api_key(settings))


@dataclass
class _Work:
    """One request under way."""

    request: Request
    path: str
    body: dict[str, object]
    handle: Handle
    reader: AnswerReader
    submitted: float = field(default_factory=time.perf_counter)
    first: float | None = None
    task: asyncio.Task[None] | None = None

    def put(self, chunk: Chunk) -> None:
        if self.first is None:
            self.first = time.perf_counter()
        self.handle.put(chunk)

    def end(self, cancelled: bool = False) -> None:
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


class RemoteEngine:
    """Asks servers. Thread-safe; see `calpaca.core.engine.Engine`.

    `model` is its name there; None is the only one there is. Raises ModelError when no server answers.
    """

    name = "remote"
    template = ChatTemplate("{{ raise_exception('the server renders the conversation') }}", {})

    def __init__(
        self,
        addresses: Sequence[Address],
        model: str | None = None,
        settings: RemoteSettings = RemoteSettings(),
        api_key: str | None = None,
    ) -> None:
        self._settings = settings
        self._secret = api_key
        self._closed = False
        self._loop = LoopThread("calpaca-remote")
        try:
            self._loop.wait(self._open(addresses, model))
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    # What the servers are ------------------------------------------------------------------------------------------
    async def _open(self, addresses: Sequence[Address], model: str | None) -> None:
        self._client = async_client(self._settings, self._secret)
        self._endpoints = Endpoints(addresses, self._is_well)
        found = await asyncio.gather(*map(self._describe, addresses))
        servers = [server for server in found if isinstance(server, Server)]
        failures = [each for each in found if not isinstance(each, Server)]
        for failure in failures:
            if not servers:
                raise failure
            log.warning("%s", failure.message)
        for endpoint in self._endpoints.all:
            if endpoint.address not in [server.address for server in servers]:
                self._endpoints.failed(endpoint)
        self._model = _choose_model(servers, model)
        dialects = {server.dialect.name: server.dialect for server in servers}
        self._dialect: Dialect = next(iter(dialects.values()))
        if len(dialects) > 1:
            raise UsageError(
                f"The servers are of several kinds: {', '.join(sorted(dialects))}.",
                "Name servers of one kind, or say which in [remote] server.",
            )
        self._capabilities = self._describe_engine(addresses, [server.models.get(self._model) for server in servers])
        self._tokenizer = RemoteTokenizer(self._client, self._model, self._dialect, self._secret)

    async def _describe(self, address: Address) -> Server | CalpacaError:
        try:
            return await describe(self._client, address, self._settings.server, self._secret)
        except PassingError as error:
            return ModelError(
                f"The server {address.shown} cannot be asked: {error.reason}.", "Is it started, and the address right?"
            )
        except CalpacaError as error:
            return error

    async def _is_well(self, endpoint: Endpoint) -> bool:
        return isinstance(await self._describe(endpoint.address), Server)

    def _describe_engine(self, addresses: Sequence[Address], served: Sequence[ServedModel | None]) -> Capabilities:
        models = [each for each in served if each is not None]
        lengths = [each.context_length for each in models if each.context_length is not None]
        own = {each.fingerprint for each in models if each.fingerprint is not None}
        # Weights are not seen here: without a word from the server, name and addresses are all that is known of them.
        identity = json.dumps([self._model, *(sorted(own) or sorted(each.shown for each in addresses))])
        return Capabilities(
            context_length=min(lengths, default=None),
            token_ids=self._dialect.tokenizes,
            max_logprobs=self._dialect.max_logprobs,
            grammars=self._dialect.grammars,
            conversations=True,
            stop_texts=self._dialect.names_stops,
            unsupported=self._dialect.unsupported,
            details={
                "model": self._model,
                "fingerprint": hashlib.sha256(f"remote {identity}".encode()).hexdigest(),
                "server": self._dialect.name,
                "endpoints": [each.shown for each in addresses],
            },
        )

    def capabilities(self) -> Capabilities:
        return self._capabilities

    # Tokens --------------------------------------------------------------------------------------------------------
    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:
        """Ask the server. Raises UnsupportedError for one that does not tokenize."""
        parts = (text,) if isinstance(text, str) else text
        address = self._tokenizing_address()
        return [
            token
            for position, part in enumerate(parts)
            for token in self._loop.wait(
                self._tokenizer.encode(address, part, special_tokens=special_tokens and position == 0)
            )
        ]

    def decode(self, token_ids: list[int]) -> str:
        return self._loop.wait(self._tokenizer.decode(self._tokenizing_address(), token_ids))

    def count_tokens(self, conversation: Conversation) -> int:
        """As the server renders and counts it, else an estimate."""
        if not self._dialect.tokenizes:
            return estimated_prompt(conversation)
        return self._loop.wait(self._tokenizer.count(self._tokenizing_address(), conversation))

    def _tokenizing_address(self) -> Address:
        if not self._dialect.tokenizes:
            raise UnsupportedError(
                f"The server gives no token ids: its kind is '{self._dialect.name}'.",
                "Set server in [remote] if it is vLLM or llama.cpp, or use --engine transformers.",
            )
        return (self._endpoints.awake() or self._endpoints.all)[0].address

    # Requests ------------------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> Handle:
        """Send a request; see `Engine.submit`. What only the server can tell is raised by the handle."""
        if request.adapter is not None:
            raise UnsupportedError(
                "The engine 'remote' does not support an adapter per request.",
                "Name the adapter as the model, where the server offers it as one.",
            )
        refuse_unsupported(self.name, self._capabilities, request)
        wanted = request.sampling.max_new_tokens
        path, body = write_request(request, self._model, self._dialect, wanted or DEFAULT_NEW_TOKENS)
        if not isinstance(request.prompt, str):
            self._check_length(len(request.prompt), wanted or 1)
        if self._closed:
            raise ModelError("The engine is closed.", "Load the model again.")
        reader = AnswerReader(self._where(), request.sampling.logprobs or 0)
        work = _Work(request, path, body, Handle(lambda: self._loop.post(lambda: _cancel(work))), reader)
        self._loop.post(lambda: self._start(work))
        return work.handle

    def _where(self) -> str:
        return " or ".join(endpoint.address.shown for endpoint in self._endpoints.all)

    def _check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        length = self._capabilities.context_length
        if length is not None and prompt_tokens + new_tokens > length:
            raise ContextOverflowError(prompt_tokens, new_tokens, length)

    def _start(self, work: _Work) -> None:
        work.task = asyncio.get_running_loop().create_task(self._run(work))
        # A task that is cancelled before its first step never runs, so its end is looked at from outside.
        work.task.add_done_callback(lambda task: work.end(cancelled=True) if task.cancelled() else None)

    async def _run(self, work: _Work) -> None:
        try:
            await self._fit(work)
            await self._try(work)
            _check_grammar(work)
            work.end()
        except CalpacaError as error:
            work.handle.fail(error)
        except Exception as error:  # whatever went wrong, the reader must learn of it
            log.debug("the remote engine failed", exc_info=error)
            work.handle.fail(ModelError(f"Asking {self._where()} failed: {error!r}", "Set CALPACA_DEBUG=1."))

    async def _fit(self, work: _Work) -> None:
        """Count a prompt that may not fit, where the server counts: some servers cut an answer short in silence."""
        length = self._capabilities.context_length
        request = work.request
        wanted = request.sampling.max_new_tokens
        if length is None or not self._dialect.tokenizes:
            return
        text = request.prompt if isinstance(request.prompt, str) else ""
        most = most_tokens(request.conversation, text) if text or request.conversation else len(request.prompt)
        if most + (wanted or DEFAULT_NEW_TOKENS) <= length:
            return
        address = self._tokenizing_address()
        if request.conversation is not None:
            tokens = await self._tokenizer.count(address, request.conversation)
        elif text:
            tokens = len(await self._tokenizer.encode(address, text, special_tokens=True))
        else:
            tokens = len(request.prompt)
        self._check_length(tokens, wanted or 1)
        work.body["max_tokens"] = wanted or min(DEFAULT_NEW_TOKENS, length - tokens)

    async def _try(self, work: _Work) -> None:
        """Ask one server after the other, as long as none has begun to answer."""
        for attempt in range(1, self._settings.retries + 2):
            try:
                with self._endpoints.next() as endpoint:
                    await self._ask(endpoint, work)
            except PassingError as error:
                shown = endpoint.address.shown
                self._endpoints.failed(endpoint, error.wait)
                if attempt > self._settings.retries or (error.wait or 0.0) > _LONGEST_WAIT:
                    raise _given_up(shown, attempt, error) from error
                log.debug("%s: %s; try %s failed", shown, error.reason, attempt)
                if not self._endpoints.awake():
                    await asyncio.sleep(backoff(attempt) if error.wait is None else error.wait)
            else:
                self._endpoints.answered(endpoint)
                return

    async def _ask(self, endpoint: Endpoint, work: _Work) -> None:
        """One try. Raises PassingError when another may succeed, CalpacaError otherwise."""
        shown = endpoint.address.shown
        try:
            async with self._client.stream("POST", endpoint.address.url + work.path, json=work.body) as response:
                if response.status_code != httpx.codes.OK:
                    asked = Asked(shown, work.body, self._dialect, self._secret)
                    raise refusal(response.status_code, response.headers, await read_bounded(response), asked)
                await self._read(response, work)
        except httpx.ReadTimeout as error:
            raise silent(shown, self._settings.timeout) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            if work.first is None:
                raise PassingError(reason(error)) from error
            if work.reader.finish is None:
                raise _broken_off(shown) from error
        if work.reader.finish is None:
            raise _broken_off(shown)

    async def _read(self, response: httpx.Response, work: _Work) -> None:
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
                chunk = work.reader.read(event)
                if chunk is not None:
                    work.put(chunk)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.cancel_all()
        with suppress(AttributeError):  # it may have failed before there was a client
            self._loop.wait(self._client.aclose())
        self._loop.close()
        atexit.unregister(self.close)


def _cancel(work: _Work) -> None:
    if work.task is not None:
        work.task.cancel()


def _choose_model(servers: Sequence[Server], model: str | None) -> str:
    """The model's name, checked against every list there is."""
    for server in servers:
        if not server.models:
            continue
        if model is None and len(server.models) > 1:
            raise UsageError(
                f"The server {server.address.shown} offers several models: {', '.join(server.models)}.",
                "Name one with --model.",
            )
        model = model or next(iter(server.models))
        if model not in server.models:
            message, hint = unknown_name("model", model, server.models)
            raise ModelNotFoundError(f"The server {server.address.shown}: {message}", hint)
    if model is None:
        raise UsageError("The server gives no list of its models.", "Name one with --model.")
    return model


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


def _check_grammar(work: _Work) -> None:
    """A server that does not know a field ignores it in silence; a text that breaks its grammar shows that."""
    grammar, reader = work.request.grammar, work.reader
    if grammar is None or reader.finish != "stop" or work.request.sampling.stop:
        return
    holds = True
    if grammar.kind == "json_schema":
        try:
            json.loads(reader.text)
        except ValueError:
            holds = False
    else:
        with suppress(re.error):  # another syntax than Python's
            holds = re.fullmatch(str(grammar.value), reader.text, re.DOTALL) is not None
    if not holds:
        raise UnsupportedError(
            f"The server did not keep to the {grammar.kind.replace('_', ' ')}.",
            "Another version of it may; --engine transformers does.",
        )
