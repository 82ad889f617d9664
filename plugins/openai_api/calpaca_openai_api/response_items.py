"""The items of a response's input, in the form in which they are stored and listed, and as messages of a chat."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from calpaca_openai_api.faults import ApiError, unsupported

Item = dict[str, Any]


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def text_part(text: str, logprobs: Iterable[Mapping[str, Any]] = ()) -> Item:
    """OpenAI's OutputTextContent."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def read_items(given: str | list[dict[str, Any]]) -> list[Item]:
    """Items with ids, states and content parts: OpenAI's ItemResource. Raises ApiError that names the wrong one."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_read(item, f"input.{index}") for index, item in enumerate(given)]


def _read(item: Mapping[str, Any], where: str) -> Item:
    kind = item.get("type", "message")
    match kind:
        case "message":
            return _message(item, where)
        case "function_call":
            return {**_texts(item, where, "call_id", "name", "arguments"), **_marks(item, kind, "fc")}
        case "function_call_output":
            read = _texts(item, where, "call_id")
            return {**read, "output": _output(item.get("output"), f"{where}.output"), **_marks(item, kind, "fco")}
    raise unsupported(where, f"items are messages, function calls and their outputs; this is of type {kind!r}.")


def _marks(item: Mapping[str, Any], kind: str, prefix: str) -> Item:
    id = item.get("id")
    return {"id": id if isinstance(id, str) and id else new_id(prefix), "type": kind, "status": "completed"}


def _texts(item: Mapping[str, Any], where: str, *names: str) -> Item:
    for name in names:
        if not isinstance(item.get(name), str):
            raise ApiError(400, f"The item at {where} needs the text '{name}'.", param=f"{where}.{name}")
    return {name: item[name] for name in names}


def _message(item: Mapping[str, Any], where: str) -> Item:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise ApiError(400, f"The role at {where} is none: {role!r}.", param=f"{where}.role")
    if isinstance(content, str):
        content = [{"type": "output_text" if role == "assistant" else "input_text", "text": content}]
    if not isinstance(content, list):
        raise ApiError(400, f"The message at {where} has no content.", param=f"{where}.content")
    parts = [_part(part, role, f"{where}.content.{index}") for index, part in enumerate(content)]
    return {**_marks(item, "message", "msg"), "role": role, "content": parts}


def _part(part: Any, role: str, where: str) -> Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if role == "assistant" and kind == "refusal":
        return {"type": kind, **_texts(part, where, "refusal")}
    if kind not in ("input_text", "output_text", "text"):
        raise unsupported(where, f"the models here read text only; this part is of type {kind!r}.")
    text = _texts(part, where, "text")["text"]
    return text_part(text) if role == "assistant" else {"type": "input_text", "text": text}


def _output(output: Any, where: str) -> str:
    if isinstance(output, str):
        return output
    if not isinstance(output, list):
        raise ApiError(400, f"The output at {where} is no text.", param=where)
    return "\n".join(_part(part, "user", f"{where}.{index}")["text"] for index, part in enumerate(output))


def as_messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Messages of a chat. What an assistant said and the calls it made next to it are one message there."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if item["type"] == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None, "tool_calls": []})
            called = {"name": item["name"], "arguments": item["arguments"]}
            messages[-1].setdefault("tool_calls", []).append({"id": item["call_id"], "function": called})
        elif item["type"] == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
        else:
            text = "\n".join(part.get("text", part.get("refusal", "")) for part in item["content"])
            messages.append({"role": item["role"], "content": text})
    return messages
