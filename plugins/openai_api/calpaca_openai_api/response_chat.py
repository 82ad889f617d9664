"""A request for a response as the chat that answers it: there is one path of generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from calpaca_openai_api.bodies import ChatBody
from calpaca_openai_api.faults import ApiError, unsupported
from calpaca_openai_api.response_body import ResponseBody, TextFormat
from calpaca_openai_api.response_items import Item, as_messages

_SHARED = [
    "model",
    "temperature",
    "top_p",
    "stream",
    "seed",
    "stop",
    "frequency_penalty",
    "presence_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "options",
]
"""Fields that mean the same in both."""

_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
"""What a chat's fields are called here."""


def as_chat(body: ResponseBody, items: Iterable[Item]) -> ChatBody:
    """The chat about `items`, the earlier turns among them. Raises ApiError."""
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages = [*instructions, *as_messages(items)]
    if not messages:
        raise ApiError(400, "There is nothing to answer: 'input' is empty.", param="input")
    chat = {name: getattr(body, name) for name in _SHARED} | {
        "messages": messages,
        "max_tokens": body.max_output_tokens,
        "response_format": _response_format(body.format),
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": _tool_choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "logprobs": body.wants_logprobs or None,
        "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
    }
    try:
        return ChatBody.model_validate({name: value for name, value in chat.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        name = _NAMES.get(field, field)
        raise ApiError(400, f"Invalid value for '{name}': {first['msg']}.", param=name, code="invalid_value") from error


def renamed(error: ApiError) -> ApiError:
    """What a chat's refusal is called here."""
    field, _, rest = (error.param or "").partition(".")
    if field not in _NAMES:
        return error
    name = ".".join(filter(None, (_NAMES[field], rest)))
    message = error.message.replace(f"'{field}'", f"'{_NAMES[field]}'")
    return ApiError(error.status, message, param=name, code=error.code, headers=error.headers)


def _response_format(wanted: TextFormat) -> dict[str, Any] | None:
    if wanted.type != "json_schema":
        return None if wanted.type == "text" else {"type": wanted.type}
    if wanted.schema_ is None or wanted.name is None:
        raise ApiError(400, "A format of type 'json_schema' needs 'name' and 'schema'.", param="text.format")
    return {"type": wanted.type, "json_schema": wanted.model_dump(exclude={"type"}, exclude_none=True)}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise unsupported("tools", f"functions can be called; there is no built-in tool {tool.get('type')!r}.")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(body: ResponseBody) -> str | dict[str, Any] | None:
    choice = body.tool_choice
    if choice in ("auto", "none") and not body.tools:
        return None  # says nothing then
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return _named(choice)
    tools = choice.get("tools")
    if choice.get("type") == "allowed_tools" and isinstance(tools, list):
        named = [_named(tool) if isinstance(tool, dict) else tool for tool in tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    raise unsupported("tool_choice", "it is a word, names one function, or lists allowed functions with a mode.")


def _named(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": tool.get("type"), "function": {"name": tool.get("name")}}
