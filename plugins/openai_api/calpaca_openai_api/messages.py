"""A chat's messages as the chat template takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from calpaca_openai_api.bodies import Call, Message
from calpaca_openai_api.faults import ApiError

_ROLES = {"developer": "system", "function": "tool"}


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Raises ApiError that names the message which cannot be shown to a model."""
    return [_plain(message, f"messages.{index}") for index, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    calls = [_call(call, where) for call in message.tool_calls or ()]
    if message.content is None and message.refusal is None and not (message.role == "assistant" and calls):
        raise ApiError(400, f"The message at {where} has no content.", param=f"{where}.content")
    if message.role == "tool" and message.tool_call_id is None:
        raise ApiError(400, f"The tool message at {where} names no call.", param=f"{where}.tool_call_id")
    plain: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": text_of(message, where)}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return {**plain, "tool_calls": calls} if calls else plain


def text_of(message: Message, where: str) -> str:
    """The text of a message; its parts joined."""
    if message.content is None:
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(_part(part, f"{where}.content.{index}") for index, part in enumerate(message.content))


def _part(part: Mapping[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise ApiError(400, f"The model reads text only; {where} is of type {kind!r}.", param=where)
    text = part.get(kind)
    if not isinstance(text, str):
        raise ApiError(400, f"The part at {where} has no text.", param=f"{where}.{kind}")
    return text


def _call(call: Call, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"The arguments of a tool call at {where} are no JSON object.", param=f"{where}.tool_calls")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
