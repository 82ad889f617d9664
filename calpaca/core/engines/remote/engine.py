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
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from calpaca.core.engine import (
    Capabilities,
    Conversation,
    Handle,
    Request,
    refuse_unsupported,
)
from calpaca.core.engines.limits import DEFAULT_NEW_TOKENS
from calpaca.core.engines.remote.address import Address, find_servers, read_api_key
from calpaca.core.engines.remote.answer import AnswerReader, ScoreReader
from calpaca.core.engines.remote.client import async_client
from calpaca.core.engines.remote.dialect import Dialect, write_request, write_scoring
from calpaca.core.engines.remote.endpoints import Endpoint, Endpoints
from calpaca.core.engines.remote.estimate import estimated_prompt, most_tokens
from calpaca.core.engines.remote.exchange import Exchange, Route
from calpaca.core.engines.remote.loop import LoopThread
from calpaca.core.engines.remote.refusal import PassingError
from calpaca.core.engines.remote.server import RemoteTokenizer, ServedModel, Server, describe
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
    key = spec.api_key.get_secret_value() if spec.api_key is not None else read_api_key(settings)
    return RemoteEngine(addresses, model, settings, key)


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
        self._lock = threading.Lock()  # nothing is submitted while the loop goes down
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
        self._route = Route(
            self._client, self._endpoints, self._dialect, self._settings.retries, self._settings.timeout, self._secret
        )
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
            prompt_logprobs=self._dialect.scores,
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
        self._check_open()
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
        if request.conversation is not None and request.prompt_logprobs is not None:
            raise UnsupportedError(
                "The engine 'remote' does not support prompt_logprobs of a conversation.", "Give it text or token ids."
            )
        wanted = request.sampling.max_new_tokens
        path, body = write_request(request, self._model, self._dialect, wanted or DEFAULT_NEW_TOKENS)
        if not isinstance(request.prompt, str):
            self._check_length(len(request.prompt), 1 if wanted is None else wanted)
        stops = request.sampling.stop if self._dialect.stops_here else ()
        reader = AnswerReader(self._where(), request.sampling.logprobs or 0, stops)
        work: Exchange = Exchange(request, path, body, Handle(lambda: self._loop.post(work.cancel)), reader)
        with self._lock:
            self._check_open()
            self._loop.post(lambda: self._start(work))
        return work.handle

    def _check_open(self) -> None:
        if self._closed:
            raise ModelError("The engine is closed.", "Load the model again.")

    def _where(self) -> str:
        return " or ".join(endpoint.address.shown for endpoint in self._endpoints.all)

    def _check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        length = self._capabilities.context_length
        if length is not None and prompt_tokens + new_tokens > length:
            raise ContextOverflowError(prompt_tokens, new_tokens, length)

    def _start(self, work: Exchange) -> None:
        work.task = asyncio.get_running_loop().create_task(self._run(work))
        # A task that is cancelled before its first step never runs, so its end is looked at from outside.
        work.task.add_done_callback(lambda task: work.end(cancelled=True) if task.cancelled() else None)

    async def _run(self, work: Exchange) -> None:
        try:
            await self._fit(work)
            if work.request.prompt_logprobs is not None:
                await self._score(work, work.request.prompt_logprobs)
            if work.request.sampling.max_new_tokens != 0:
                await work.send(self._route)
            work.end()
        except CalpacaError as error:
            work.handle.fail(error)
        except Exception as error:  # whatever went wrong, the reader must learn of it
            log.debug("the remote engine failed", exc_info=error)
            work.handle.fail(ModelError(f"Asking {self._where()} failed: {error!r}", "Set CALPACA_DEBUG=1."))

    async def _score(self, work: Exchange, alternatives: int) -> None:
        """Ask for the prompt's own log probabilities, before the answer and apart from it: so nothing of the text that
        a server puts before an answer then has to be taken off it again."""
        prompt = work.request.prompt
        if isinstance(prompt, str):
            prompt = tuple(await self._tokenizer.encode(self._tokenizing_address(), prompt, special_tokens=True))
        path, body = write_scoring(prompt, self._model, self._dialect, alternatives)
        reader = ScoreReader(self._where(), prompt, alternatives)
        scoring = Exchange(replace(work.request, grammar=None), path, body, work.handle, reader)
        await scoring.send(self._route)
        if work.request.sampling.max_new_tokens == 0:
            work.reader, work.first = reader, scoring.first

    async def _fit(self, work: Exchange) -> None:
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
        self._check_length(tokens, 1 if wanted is None else wanted)
        work.body["max_tokens"] = wanted or min(DEFAULT_NEW_TOKENS, length - tokens)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loop.cancel_all()
        with suppress(AttributeError):  # it may have failed before there was a client
            self._loop.wait(self._client.aclose())
        self._loop.close()
        atexit.unregister(self.close)


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
