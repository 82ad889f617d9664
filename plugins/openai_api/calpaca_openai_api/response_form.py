"""How an answer is written down as OpenAI's Response: the events of a stream, the last of which carries it whole.

Pieces are read once, whether the response is streamed or not, so that the two cannot differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from calpaca.core.engine import Sampling, Usage
from calpaca.core.tools import ToolCall
from calpaca_openai_api.faults import ApiError
from calpaca_openai_api.generation import Piece
from calpaca_openai_api.response_body import ResponseBody
from calpaca_openai_api.response_items import Item, new_id, text_part
from calpaca_openai_api.tokens import Token, chat_logprobs

_DEFAULTS: dict[str, Any] = {
    "completed_at": None,
    "error": None,
    "incomplete_details": None,
    "max_tool_calls": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
}

UNFINISHED = ("queued", "in_progress")
"""States of a response that goes on."""


class ResponseForm:
    """Reads pieces into `response`, and keeps the events that they gave until they are fetched."""

    def __init__(
        self, body: ResponseBody, model: str, sampling: Sampling | None, notices: tuple[str, ...] = ()
    ) -> None:
        """`sampling` is what a language model is asked with; an app has its own. `notices` say what was not used."""
        self._logprobs = body.wants_logprobs
        self._events: list[dict[str, Any]] = []
        self._count = 0
        self._message: Item | None = None
        self._usage = Usage()
        self._started = False
        self.response: dict[str, Any] = {
            **_DEFAULTS,
            **_told_back(body),
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": model,
            "temperature": sampling.temperature if sampling is not None else body.temperature or 1.0,
            "top_p": sampling.top_p if sampling is not None else body.top_p or 1.0,
            "output": [],
            "usage": _usage_fields(Usage()),  # the published schema knows no null here, others no response without it
            **({"notices": list(notices)} if notices else {}),
        }

    # What answering.Form asks for -----------------------------------------------------------------------------------
    def whole(self, pieces: list[Piece]) -> dict[str, Any]:  # noqa: ARG002
        """The response; its pieces have been read already."""
        return self.response

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        yield from self.last_events()

    def last_events(self) -> Iterator[dict[str, Any]]:
        events, self._events = self._events, []
        yield from events

    def usage(self) -> Usage:
        return self._usage

    # Reading --------------------------------------------------------------------------------------------------------
    @property
    def begun(self) -> bool:
        """Whether anything has been told."""
        return self._count > 0

    def queue(self) -> None:
        """Tell of a response that waits for its turn, as one that is made in the background does."""
        self.response["status"] = "queued"
        self._tell("created", response=self._copy())
        self._tell("queued", response=self._copy())

    def start(self) -> None:
        """Tell, once, that the response is being made."""
        if self._started:
            return
        self._started = True
        self.response["status"] = "in_progress"
        if not self.begun:
            self._tell("created", response=self._copy())
        self._tell("in_progress", response=self._copy())

    def read(self, piece: Piece) -> None:
        """Take the next piece. The last one, which has a finish reason, ends the response."""
        self.start()
        if piece.text or piece.tokens:
            self._read_text(piece.text, piece.tokens)
        for call in piece.calls:
            self._close_message("completed")
            self._read_call(call)
        self.response |= piece.extension
        if piece.finish is not None:
            self._end(piece.finish, piece.usage or Usage())

    def fail(self, fault: ApiError) -> None:
        """End a response that has begun with a failure."""
        code = "rate_limit_exceeded" if fault.status == 429 else "server_error"
        self._break_off("failed")
        self.response["error"] = {"code": code, "message": fault.message}
        self._tell("failed", response=self._copy())

    def cancel(self) -> None:
        """End a response whose client wants no more of it. OpenAI has no event for that."""
        self._break_off("cancelled")

    def _break_off(self, status: str) -> None:
        """End before the engine has counted its tokens."""
        self._close_message("incomplete")
        self.response["status"] = status
        self.response.pop("usage")

    def _end(self, finish: str, usage: Usage) -> None:
        cut = finish == "length"
        if not self.response["output"]:
            self._open_message()
        self._close_message("incomplete" if cut else "completed")
        self._usage = usage
        self.response |= {"status": "incomplete" if cut else "completed", "usage": _usage_fields(usage)}
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        self._tell(self.response["status"], response=self._copy())

    def _read_text(self, text: str, tokens: tuple[Token, ...]) -> None:
        message = self._message or self._open_message()
        logprobs = chat_logprobs(tokens)["content"] if self._logprobs else []
        message["content"][0]["text"] += text
        message["content"][0]["logprobs"] += logprobs
        self._tell("output_text.delta", **self._place(message), delta=text, logprobs=logprobs)

    def _open_message(self) -> Item:
        message = {"id": new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
        self._add({**message, "content": []})
        self._message = self.response["output"][-1]
        self._message["content"] = [text_part("")]
        self._tell("content_part.added", **self._place(self._message), part=text_part(""))
        return self._message

    def _close_message(self, status: str) -> None:
        if self._message is None:
            return
        message, self._message = self._message, None
        part = message["content"][0]
        place = self._place(message)
        self._tell("output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
        self._tell("content_part.done", **place, part=part)
        self._done(message, status)

    def _read_call(self, call: ToolCall) -> None:
        named = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
        self._add({"id": new_id("fc"), "status": "in_progress", **named})
        item = self.response["output"][-1]
        place = {"item_id": item["id"], "output_index": self._last_index}
        self._tell("function_call_arguments.delta", **place, delta=call.arguments)
        self._tell("function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        item["arguments"] = call.arguments
        self._done(item, "completed")

    # Events ---------------------------------------------------------------------------------------------------------
    def _add(self, item: Item) -> None:
        self.response["output"].append(item)
        self._tell("output_item.added", output_index=self._last_index, item=dict(item))

    def _done(self, item: Item, status: str) -> None:
        item["status"] = status
        self._tell("output_item.done", output_index=self._last_index, item=item)

    @property
    def _last_index(self) -> int:
        return len(self.response["output"]) - 1

    def _place(self, message: Item) -> dict[str, Any]:
        return {"item_id": message["id"], "output_index": self._last_index, "content_index": 0}

    def _copy(self) -> dict[str, Any]:
        """The response as it stands now."""
        return {**self.response, "output": list(self.response["output"])}

    def _tell(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": f"response.{kind}", "sequence_number": self._count, **fields})
        self._count += 1


def _told_back(body: ResponseBody) -> dict[str, Any]:
    """The fields of a request that its response repeats."""
    fields: dict[str, Any] = {
        "background": bool(body.background),
        "truncation": body.truncation or "disabled",
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "previous_response_id": body.previous_response_id,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"strict": None, "parameters": None, **tool} for tool in body.tools or ()],
        "text": {"format": body.format.model_dump(exclude_none=True), "verbosity": "medium"},
        "top_logprobs": body.top_logprobs or 0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "presence_penalty": body.presence_penalty or 0.0,
        "metadata": body.metadata or {},
        "store": body.is_kept,
        "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": body.safety_identifier,
    }
    return {**fields, "user": body.user} if body.user is not None else fields


def _usage_fields(usage: Usage) -> dict[str, Any]:
    """OpenAI's ResponseUsage; `estimated` is added where the engine could not count."""
    fields: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
    return {**fields, "estimated": True} if usage.estimated else fields
