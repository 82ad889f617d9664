"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from calpaca.core.engine import Chunk, Grammar, Handle, Sampling, Usage
from calpaca.core.errors import UsageError
from calpaca.core.model import Model
from calpaca.core.tools import (
    BEGIN,
    BrokenCall,
    CallReader,
    Choice,
    ToolCall,
    answer_grammar,
    describe_format,
    read_choice,
    tool_name,
)
from calpaca_openai_api.bodies import AllowedTools, ChatBody, NamedTool
from calpaca_openai_api.faults import ApiError, unsupported
from calpaca_openai_api.generation import Piece, generated, total_usage
from calpaca_openai_api.messages import plain_messages
from calpaca_openai_api.sampling import (
    Defaults,
    for_choice,
    refuse_fields,
    refuse_what_the_engine_cannot,
    structured_grammar,
)
from calpaca_openai_api.tokens import TokenReader, chat_logprobs
from calpaca_openai_api.wire import Envelope, usage_fields

_DEFAULT_TOKENS = 512
"""About how long an answer may get whose request does not say: what a schema's open ends are bounded by."""


def refuse_chat_fields(body: ChatBody) -> None:
    """Raise ApiError for fields that ask for what no model here does, and for those that contradict each other."""
    refuse_fields(body)
    media = set(body.modalities or ()) - {"text"} or body.audio
    wanted = {
        "modalities": media,
        "reasoning_effort": body.reasoning_effort not in (None, "none"),
        "verbosity": body.verbosity not in (None, "medium"),
        "web_search_options": body.web_search_options is not None,
        "functions": body.functions,
        "function_call": body.function_call is not None,
        "moderation": body.moderation is not None,
    }
    for name, asked in wanted.items():
        if asked:
            hint = (
                "use 'tools' and 'tool_choice'." if name.startswith("function") else "the models here do not do this."
            )
            raise unsupported(name, hint)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
    if body.logprobs and body.tools and body.tool_choice != "none":
        raise unsupported("logprobs", "an answer that may call tools has none.")


@dataclass(frozen=True)
class ChatPlan:
    """A chat request, ready to be started."""

    body: ChatBody
    model: Model
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    sampling: Sampling
    grammar: Grammar | None

    @property
    def is_forced(self) -> bool:
        """Whether the whole answer is one call."""
        return bool(self.tools) and self.grammar is not None and self.grammar.kind == "json_schema"

    def start(self) -> list[Handle]:
        """Ask the engine, once for each choice."""
        return [
            self.model.chat(
                self.messages, for_choice(self.sampling, choice), tools=self.tools, grammar=self.grammar
            )
            for choice in range(self.body.choices)
        ]  # fmt: skip

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answers as they come."""
        readers = [_ChoiceReader(index, self) for index in range(self.body.choices)]
        async with aclosing(generated(self.start)) as chunks:  # type: ignore[type-var]
            async for index, chunk in chunks:
                yield readers[index].read(chunk)


def plan_chat(body: ChatBody, model: Model, defaults: Defaults) -> ChatPlan:
    """Check a request against what the model can do. Raises ApiError, UsageError."""
    refuse_chat_fields(body)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = defaults.sampling(body, body.most_tokens, logprobs)
    refuse_what_the_engine_cannot(body, model.engine.capabilities(), sampling)
    messages = plain_messages(body.messages)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice, allowed = _choice(body, tools)
    shown = [] if choice == "none" else allowed
    grammar = structured_grammar(body) or _grammar(body, shown, choice, sampling)
    if body.response_format is not None:
        messages = [*describe_format(body.response_format.model_dump(exclude_none=True)), *messages]
    _refuse_grammar(grammar, model, shown)
    return ChatPlan(body, model, messages, shown, sampling, grammar)


def _choice(body: ChatBody, tools: list[dict[str, Any]]) -> tuple[Choice, list[dict[str, Any]]]:
    """What must be called, and the tools it is chosen among: all, or those of OpenAI's `allowed_tools`."""
    wanted = body.tool_choice
    if wanted is None:
        return "auto", tools
    if not tools:
        raise ApiError(400, "'tool_choice' needs 'tools'.", param="tool_choice")
    try:
        if isinstance(wanted, dict) and wanted.get("type") == "allowed_tools":
            allowed = AllowedTools.model_validate(wanted["allowed_tools"])
            names = {read_choice(tool.model_dump(), tools)[0] for tool in allowed.tools}
            kept = [tool for tool in tools if tool_name(tool) in names]
            return read_choice(allowed.mode, kept), kept
        if isinstance(wanted, dict):
            NamedTool.model_validate(wanted)
        return read_choice(wanted, tools), tools
    except UsageError as error:
        raise ApiError(400, str(error), param="tool_choice") from error
    except (ValidationError, KeyError) as error:
        message = "A tool choice is a word, names one function, or lists allowed tools with a mode."
        raise ApiError(400, message, param="tool_choice") from error


def _grammar(body: ChatBody, tools: list[dict[str, Any]], choice: Choice, sampling: Sampling) -> Grammar | None:
    wanted = body.response_format.model_dump(exclude_none=True) if body.response_format is not None else None
    try:
        return answer_grammar(
            tools,
            choice,
            wanted,
            tokens=sampling.max_new_tokens or _DEFAULT_TOKENS,
            several=body.parallel_tool_calls is not False,
        )
    except UsageError as error:
        raise ApiError(400, str(error), param="response_format") from error


def _refuse_grammar(grammar: Grammar | None, model: Model, tools: list[dict[str, Any]]) -> None:
    if grammar is not None and grammar.kind not in model.engine.capabilities().grammars:
        field = "tools" if tools else "response_format"
        raise unsupported(field, "the engine that runs this model cannot hold it to that.")


class _ChoiceReader:
    """Turns the chunks of one choice into pieces, tool calls among them."""

    def __init__(self, index: int, plan: ChatPlan) -> None:
        self._index = index
        self._calls = CallReader(forced=plan.is_forced) if plan.tools else None
        self._tokens = TokenReader(plan.model.engine) if plan.sampling.logprobs is not None else None
        self._called = False

    def read(self, chunk: Chunk) -> Piece:
        text, calls = self._split(chunk)
        self._called = self._called or bool(calls)
        finish: str | None = chunk.finish_reason
        return Piece(
            self._index,
            text,
            tuple(self._tokens.read(chunk)) if self._tokens is not None else (),
            chunk.token_ids,
            calls,
            "tool_calls" if self._called and finish == "stop" else finish,
            chunk.stop,
            chunk.usage,
        )

    def _split(self, chunk: Chunk) -> tuple[str, tuple[ToolCall, ...]]:
        """Text and calls that are certain. What should be a call and is broken off stays text."""
        if self._calls is None:
            return chunk.text, ()
        parts = [*self._calls.feed(chunk.text), *(self._calls.end() if chunk.finish_reason is not None else ())]
        texts = [f"{BEGIN}\n{part.text}" if isinstance(part, BrokenCall) else part for part in parts
                 if not isinstance(part, ToolCall)]  # fmt: skip
        return "".join(texts), tuple(part for part in parts if isinstance(part, ToolCall))


class ChatForm:
    """How chats are written down: CreateChatCompletionResponse, and its chunks."""

    def __init__(self, body: ChatBody, envelope: Envelope) -> None:
        self._body = body
        self._envelope = envelope
        self._begun: set[int] = set()
        self._call_counts: dict[int, int] = {}
        self._usages: list[Usage] = []
        self._extension: dict[str, object] = {}

    # Whole ---------------------------------------------------------------------------------------------------------
    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        choices = [
            self._choice(index, [piece for piece in pieces if piece.index == index])
            for index in range(self._body.choices)
        ]
        self._usages = [piece.usage for piece in pieces if piece.usage is not None]
        extension = {name: value for piece in pieces for name, value in piece.extension.items()}
        return {
            **self._envelope.fields("chat.completion"),
            "choices": choices,
            "usage": usage_fields(self.usage()),
            **extension,
        }

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        calls = [_call(call) for piece in pieces for call in piece.calls]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
            "annotations": [],
        }
        tokens = [token for piece in pieces for token in piece.tokens]
        choice = {
            "index": index,
            "message": {**message, "tool_calls": calls} if calls else message,
            "logprobs": chat_logprobs(tokens) if self._body.logprobs else None,
            "finish_reason": pieces[-1].finish,
        }
        return choice | _extras(self._body, pieces)

    # Streamed ------------------------------------------------------------------------------------------------------
    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        self._extension |= piece.extension
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield self._chunk(piece.index, {"role": "assistant", "content": "", "refusal": None})
        if piece.text or piece.tokens:
            logprobs = chat_logprobs(piece.tokens) if self._body.logprobs else None
            yield self._chunk(piece.index, {"content": piece.text}, logprobs=logprobs, extras=_ids(self._body, [piece]))
        for call in piece.calls:
            yield from self._call_chunks(piece.index, call)
        if piece.finish is not None:
            self._usages.append(piece.usage or Usage())
            stray = {} if piece.text or piece.tokens else _ids(self._body, [piece])
            extras = {"stop_reason": piece.stop} if self._body.return_token_ids else {}
            yield self._chunk(piece.index, {}, finish=piece.finish, extras=stray | extras)

    def last_events(self) -> Iterator[dict[str, Any]]:
        """Usage, and what an app adds."""
        if not (self._body.wants_usage or self._extension):
            return
        chunk = {**self._envelope.fields("chat.completion.chunk"), "choices": [], **self._extension}
        if self._body.wants_usage:
            chunk["usage"] = usage_fields(self.usage())
        yield chunk

    def usage(self) -> Usage:
        return total_usage(self._usages)

    def _call_chunks(self, index: int, call: ToolCall) -> Iterator[dict[str, Any]]:
        """Id and name first, then the arguments."""
        number = self._call_counts.get(index, 0)
        self._call_counts[index] = number + 1
        named = {"name": call.name, "arguments": ""}
        yield self._chunk(
            index, {"tool_calls": [{"index": number, "id": call.id, "type": "function", "function": named}]}
        )
        yield self._chunk(index, {"tool_calls": [{"index": number, "function": {"arguments": call.arguments}}]})

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
        extras: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish, **(extras or {})}
        chunk = {**self._envelope.fields("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self._body.wants_usage else chunk


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _ids(body: ChatBody, pieces: list[Piece]) -> dict[str, Any]:
    """The extension `token_ids`."""
    ids = [token for piece in pieces for token in piece.token_ids]
    return {"token_ids": ids} if body.return_token_ids and ids else {}


def _extras(body: ChatBody, pieces: list[Piece]) -> dict[str, Any]:
    """Extensions of a whole choice."""
    return {**_ids(body, pieces), "stop_reason": pieces[-1].stop} if body.return_token_ids else {}
