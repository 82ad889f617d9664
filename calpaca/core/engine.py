"""The Engine protocol: text or token ids in, chunks out, through one thread-safe call.

`submit(request)` returns a `Handle` at once. The handle is iterated, awaited or cancelled, from any thread or event
loop; batching lives below this call, so threads, asyncio and a server share the same forward passes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from calpaca.core.errors import UnsupportedError, UsageError
from calpaca.core.registry import Component
from calpaca.core.template import ChatTemplate, Message

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off.

    `max_new_tokens` None means 512 or what is left of the context, whichever is less; a number that does not fit is an
    error, and 0 is only for requests that score their prompt. `min_p` keeps tokens of at least this share of the
    likeliest one's probability. `frequency_penalty` (for each occurrence) and `presence_penalty` (once) are subtracted
    from the logits of tokens that the answer has so far, as OpenAI's API defines them; `repetition_penalty` looks at the
    prompt too. `logit_bias` is added to the logits of token ids, before any grammar. `logprobs` is how many alternatives
    are reported beside each chosen token. Raises UsageError out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        bounds: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 0, "0 or more"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", self.repetition_penalty > 0.0, "above 0"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("stop", all(self.stop), "texts of at least one character"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("logit_bias", _is_bias(self.logit_bias), "a value between -100 and 100 for each token id, named once"),
        )
        for name, holds, allowed in bounds:
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)!r}.", f"It must be {allowed}.")


def _is_bias(pairs: tuple[tuple[int, float], ...]) -> bool:
    ids = {token_id for token_id, _ in pairs}
    return len(ids) == len(pairs) and all(token_id >= 0 and -100.0 <= value <= 100.0 for token_id, value in pairs)


@dataclass(frozen=True)
class Grammar:
    """What the text must look like: a JSON schema (mapping), a regular expression or a Lark grammar (strings)."""

    kind: Literal["json_schema", "regex", "lark"]
    value: Mapping[str, Any] | str


@dataclass(frozen=True)
class Conversation:
    """Messages, and OpenAI function schemas that the model is shown, not rendered yet."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Request:
    """One generation. `prompt` is text, tokenised as it stands, or token ids.

    `adapter` names a loaded adapter; `cache_key` groups requests that share a prefix, for engines that cache by key.
    `new_text` says that the answer is a text of its own (a chat's) and does not continue the prompt's: the space that
    SentencePiece puts before every text is then left out. `conversation` stands in place of an empty `prompt`, for
    engines that render it themselves (`Capabilities.conversations`). `prompt_logprobs` asks for the log probabilities of
    the prompt's own tokens, and is how many alternatives are reported beside each; the answer may then be of 0 tokens.
    Raises UsageError out of range.
    """

    prompt: str | tuple[int, ...]
    sampling: Sampling = Sampling()
    grammar: Grammar | None = None
    adapter: str | None = None
    cache_key: str | None = None
    new_text: bool = False
    conversation: Conversation | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= 20:
            raise UsageError(f"prompt_logprobs is {self.prompt_logprobs!r}.", "It must be between 0 and 20.")
        if self.sampling.max_new_tokens == 0 and self.prompt_logprobs is None:
            raise UsageError("max_new_tokens is 0.", "It must be at least 1, unless prompt_logprobs are asked for.")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of the model's probability of a token, before temperature, penalties and grammar.

    The token id is -1 where the engine does not know it.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts. `estimated` where the engine does not know the ids and counted otherwise."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    estimated: bool = False

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.estimated or other.estimated,
        )


@dataclass(frozen=True)
class Timings:
    """Seconds from `submit` to the first token and to the end."""

    first_token: float
    total: float


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one carries `finish_reason`, `usage` and `timings`; `stop` is the text that ended
    it, where a stop text did. The first one carries `prompt_logprobs`, where they were asked for: an entry for every
    token of the prompt, None for the first, which nothing precedes."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True)
class Completion:
    """All chunks of a request together."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop: str | None
    usage: Usage
    timings: Timings
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


class Handle:
    """One request under way. Safe to use from any thread and any event loop.

    Iterating (`for` or `async for`) gives the chunks as they come, from the first one, also for a late or second
    reader; leaving the loop early cancels the request. `result()` or `await` gives the whole completion.
    """

    def __init__(self, cancel: Callable[[], None] = lambda: None) -> None:
        self._chunks: list[Chunk] = []
        self._error: BaseException | None = None
        self._finished = False
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._callbacks: list[Callable[[Handle], object]] = []
        self._cancel = cancel

    # For the engine ------------------------------------------------------------------------------------------------
    def put(self, chunk: Chunk) -> None:
        """Add a chunk; one with a finish reason ends the handle."""
        with self._changed:
            if self._finished:
                return
            self._chunks.append(chunk)
            self._finished = chunk.finish_reason is not None
            self._notify()
        self._call_back()

    def fail(self, error: BaseException) -> None:
        """End the handle with an error, which every reader gets."""
        with self._changed:
            if self._finished:
                return
            self._error, self._finished = error, True
            self._notify()
        self._call_back()

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, event in self._waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def _call_back(self) -> None:
        if not self._finished:
            return
        with self._changed:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    # For the reader ------------------------------------------------------------------------------------------------
    @property
    def done(self) -> bool:
        return self._finished

    def on_end(self, callback: Callable[[Handle], object]) -> None:
        """Have `callback` called with this handle once it has ended: by the engine's thread, which it must not hold up,
        or at once where it has ended already. For a program that waits for the next of many requests."""
        with self._changed:
            self._callbacks.append(callback)
        self._call_back()

    def cancel(self) -> None:
        """Ask the engine to stop; the handle then ends with the finish reason `cancelled`. Idempotent."""
        if not self._finished:
            self._cancel()

    def __iter__(self) -> Generator[Chunk]:
        position = 0
        try:
            while True:
                chunk = self._wait_for(position)
                if chunk is None:
                    return
                position += 1
                yield chunk
        finally:
            self.cancel()

    def _wait_for(self, position: int) -> Chunk | None:
        """The chunk at a position once it is there; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._has(position))
            return self._take(position)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        position = 0
        event = asyncio.Event()
        waiter = (asyncio.get_running_loop(), event)
        with self._changed:
            self._waiters.append(waiter)
        try:
            while True:
                event.clear()
                with self._changed:
                    ready = self._has(position)
                    chunk = self._take(position) if ready else None
                if not ready:
                    await event.wait()
                    continue
                if chunk is None:
                    return
                position += 1
                yield chunk
        finally:
            with self._changed:
                self._waiters.remove(waiter)
            self.cancel()

    def _has(self, position: int) -> bool:
        return position < len(self._chunks) or self._finished

    def _take(self, position: int) -> Chunk | None:
        if position < len(self._chunks):
            return self._chunks[position]
        if self._error is not None:
            raise self._error
        return None

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end. Raises the engine's error, or TimeoutError after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._finished, timeout):
                raise TimeoutError(f"no result within {timeout} s")
        return self._completion()

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._drain().__await__()

    async def _drain(self) -> Completion:
        async for _ in self:
            pass
        return self._completion()

    def _completion(self) -> Completion:
        if self._error is not None:
            raise self._error
        last = self._chunks[-1]
        assert last.finish_reason is not None
        return Completion(
            text="".join(chunk.text for chunk in self._chunks),
            token_ids=tuple(token for chunk in self._chunks for token in chunk.token_ids),
            logprobs=tuple(logprob for chunk in self._chunks for logprob in chunk.logprobs),
            finish_reason=last.finish_reason,
            stop=last.stop,
            usage=last.usage or Usage(),
            timings=last.timings or Timings(0.0, 0.0),
            prompt_logprobs=self._chunks[0].prompt_logprobs,
        )


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do. `max_logprobs` counts alternatives per token; `grammars` lists the `Grammar` kinds.

    `context_length` is None where a server does not tell it. `token_ids`: it takes them as a prompt, and encodes text.
    `stop_texts`: the last chunk says which one ended the answer. `unsupported` names fields of `Sampling` that it
    refuses. `conversations`: it renders them itself, counts their tokens (`ConversationEngine`), and decides what is put
    around a plain text, such as bos. `prompt_logprobs`: it gives them, with up to `max_logprobs` alternatives.
    """

    context_length: int | None
    token_ids: bool = True
    max_logprobs: int = 0
    grammars: frozenset[str] = frozenset()
    adapters: bool = False
    seed: bool = True
    batching: bool = True
    conversations: bool = False
    stop_texts: bool = True
    prompt_logprobs: bool = False
    unsupported: frozenset[str] = frozenset()
    details: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Engine(Protocol):
    """What runs a model. One thread-safe primitive, `submit`; everything else describes or closes it."""

    name: str
    template: ChatTemplate

    def capabilities(self) -> Capabilities: ...

    def submit(self, request: Request) -> Handle:
        """Start a generation. Raises UnsupportedError for what the engine cannot do and ContextOverflowError when
        prompt and answer do not fit; both before anything runs. Where only a server can count, the handle raises."""
        ...

    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:
        """Token ids of `text` as it stands; `special_tokens` adds what the tokenizer puts around a text (bos).

        Several parts are one text in which no control token is seen across a border; see `ChatTemplate.parts`.
        """
        ...

    def decode(self, token_ids: list[int]) -> str: ...

    def close(self) -> None:
        """Cancel what runs, free memory. Idempotent."""
        ...


@runtime_checkable
class ConversationEngine(Engine, Protocol):
    """An engine that renders conversations itself, as a server does."""

    def count_tokens(self, conversation: Conversation) -> int:
        """Tokens of the prompt that a conversation becomes; an estimate on the high side where that is not known."""
        ...


@runtime_checkable
class AdapterEngine(Engine, Protocol):
    """An engine with several LoRA adapters of its model live at once, of which a request names one."""

    def load_adapter(self, name: str, path: str | Path, scale: float = 1.0) -> None:
        """Load an adapter from its folder; one that had the name before serves only what is under way.

        Raises AdapterError for one of another base, UnsupportedError for one that must be merged.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter. Raises AdapterError for one that is not loaded."""
        ...


@dataclass(frozen=True)
class EngineComponent(Component):
    """An engine by name. Its target is called with the model's `ModelFiles` and the runtime.

    One that is not `local` runs nothing on this machine: its target gets the `ModelSpec` instead, and the spec's model
    is a name for it alone, which is looked for in no source of weights.
    """

    local: bool = True


def refuse_unsupported(engine: str, capabilities: Capabilities, request: Request) -> None:
    """Raise UnsupportedError for the first field of `request` that `capabilities` do not cover."""
    changed = [
        name for name in sorted(capabilities.unsupported) if getattr(request.sampling, name) != getattr(Sampling, name)
    ]
    asked = (
        (request.conversation is not None and not capabilities.conversations, "a conversation that is not rendered",
         "Render it with the engine's template."),
        (not isinstance(request.prompt, str) and not capabilities.token_ids, "token ids as a prompt", "Give it text."),
        (bool(changed), " and ".join(changed), "Use --engine transformers."),
        (request.adapter is not None and not capabilities.adapters, "an adapter per request",
         "Load the model with --adapter instead."),
        (request.grammar is not None and request.grammar.kind not in capabilities.grammars,
         f"a {request.grammar.kind if request.grammar else ''} grammar", "Use --engine transformers."),
        ((request.sampling.logprobs or 0) > capabilities.max_logprobs, f"{request.sampling.logprobs} logprobs",
         f"It gives at most {capabilities.max_logprobs}; use --engine transformers."),
        (request.sampling.logprobs is not None and capabilities.max_logprobs == 0, "logprobs",
         "Use --engine transformers."),
        (request.prompt_logprobs is not None and not capabilities.prompt_logprobs, "prompt_logprobs",
         "Use --engine transformers."),
        ((request.prompt_logprobs or 0) > capabilities.max_logprobs, f"{request.prompt_logprobs} prompt_logprobs",
         f"It gives at most {capabilities.max_logprobs}."),
        (request.sampling.seed is not None and not capabilities.seed, "a seed", "Use --engine transformers."),
    )  # fmt: skip
    for refused, what, hint in asked:
        if refused:
            raise UnsupportedError(f"The engine '{engine}' does not support {what}.", hint)
