"""LangChain's messages as plain ones, and the engine's chunks as LangChain's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolCallChunk,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from calpaca.core.context import ContextUse
from calpaca.core.engine import Chunk, Usage
from calpaca.core.errors import UnsupportedError, UsageError, unknown_name
from calpaca.core.langchain.parameters import end_info, logprobs_info
from calpaca.core.model import Model
from calpaca.core.tools import BEGIN, BrokenCall, CallReader, Part, ToolCall

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
}
_MEDIA = {
    "image": "images", "image_url": "images", "audio": "audio", "input_audio": "audio", "video": "video",
    "file": "files", "document": "files", "media": "media",
}  # fmt: skip
_LEFT_OUT = frozenset({"tool_use", "tool_call", "function_call", "thinking", "redacted_thinking", "reasoning"})
"""Blocks of earlier answers: calls are taken from `tool_calls`, and models are not shown their earlier thoughts."""


def plain_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as `ChatTemplate.render` takes them.

    Raises UnsupportedError for images and other media, UsageError for an unknown role.
    """
    return [_plain(message) for message in messages]


def _plain(message: BaseMessage) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": _role(message), "content": _text(message.content)}
    if message.name:
        plain["name"] = message.name
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AIMessage) and message.tool_calls:
        plain["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
    return plain


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        if message.role.lower() not in _ROLES:
            raise UsageError(*unknown_name("role", message.role, _ROLES))
        return _ROLES[message.role.lower()]
    kinds: dict[type[BaseMessage], str] = {
        SystemMessage: "system", HumanMessage: "user", AIMessage: "assistant", ToolMessage: "tool", FunctionMessage: "tool",
    }  # fmt: skip
    for kind, role in kinds.items():
        if isinstance(message, kind):
            return role
    raise UnsupportedError(f"A message of type '{message.type}' cannot be shown to a model.", "Leave it out.")


def _text(content: str | list[Any]) -> str:
    """The text of a message: blocks joined."""
    if isinstance(content, str):
        return content
    return "\n".join(filter(None, (_block_text(block) for block in content)))


def _block_text(block: str | Mapping[str, Any]) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type") or next(iter(block), "empty block")
    if kind in _LEFT_OUT:
        return ""
    if kind in _MEDIA:
        raise UnsupportedError(
            f"The model reads text only; a message holds {_MEDIA[kind]} ('{kind}').", "Send its text."
        )
    if kind == "json":
        return json.dumps(block["json"], ensure_ascii=False)
    text = block.get("text", block.get("refusal"))
    if not isinstance(text, str):
        raise UnsupportedError(f"A message holds a block of type '{kind}', which is no text.", "Send its text.")
    return text


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Token counts as LangChain has them."""
    metadata = UsageMetadata(
        input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens
    )
    if usage.cached_tokens:
        metadata["input_token_details"] = InputTokenDetails(cache_read=usage.cached_tokens)
    return metadata


class AnswerReader:
    """Turns the chunks of one answer into LangChain's, tool calls among them.

    `reader` is None where the model has no tools; `context` says what the prompt was made of.
    """

    def __init__(self, model: Model, reader: CallReader | None, context: ContextUse) -> None:
        self._model = model
        self._reader = reader
        self._context = context
        self._called = False

    def read(self, chunk: Chunk) -> Iterator[ChatGenerationChunk]:
        """Nothing, as long as a text may turn out to be a tool call; else one chunk, the last one marked as such."""
        last = chunk.finish_reason is not None
        parts = list(self._parts(chunk.text, last))
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [self._call(part) for part in parts if not isinstance(part, str)]
        info: dict[str, Any] = {"logprobs": logprobs_info(chunk.logprobs)} if chunk.logprobs else {}
        if last:
            info |= end_info(chunk, self._model)
            info["context"] = self._context.sent(chunk.usage or Usage()).as_dict()
            if self._called and chunk.finish_reason == "stop":
                info["finish_reason"] = "tool_calls"
        if not (text or calls or info):
            return
        message = AIMessageChunk(
            content=text,
            tool_call_chunks=calls,
            usage_metadata=usage_metadata(chunk.usage or Usage()) if last else None,
            chunk_position="last" if last else None,
        )
        yield ChatGenerationChunk(message=message, generation_info=info or None)

    def _parts(self, text: str, last: bool) -> Iterator[Part]:
        if self._reader is None:
            yield text
            return
        yield from self._reader.feed(text)
        if last:
            yield from self._reader.end()

    def _call(self, part: ToolCall | BrokenCall) -> ToolCallChunk:
        """A whole call, so that it needs no index to be merged by.

        Text that should be a call is no JSON while its tag is before it: LangChain files it under the invalid calls.
        """
        self._called = True
        if isinstance(part, ToolCall):
            return tool_call_chunk(name=part.name, args=part.arguments, id=part.id)
        return tool_call_chunk(args=f"{BEGIN}\n{part.text}")
