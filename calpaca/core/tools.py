"""Tool calls: which grammar makes a model write them, and reading them out of what it wrote.

Tools are OpenAI function schemas: `{"type": "function", "function": {"name": …, "parameters": {JSON schema}}}`. A model
writes a call as `<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`, as the Hermes and Qwen families do, or as
that JSON alone where nothing else was allowed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from calpaca.core.engine import Grammar
from calpaca.core.errors import UsageError, unknown_name
from calpaca.core.json_schema import bounded, closed, split_definitions

Tool = Mapping[str, Any]
Choice = Literal["auto", "any", "none"] | tuple[str]
"""What a model must do with its tools; a tuple holds the name of the one it must call."""

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it: `arguments` is JSON text, `id` is ours."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class BrokenCall:
    """Text that stands where a call should, and what is wrong with it."""

    text: str
    reason: str


Part = str | ToolCall | BrokenCall


def tool_name(tool: Tool) -> str:
    name: str = tool["function"]["name"]
    return name


def read_choice(choice: str | bool | Mapping[str, Any] | None, tools: Sequence[Tool]) -> Choice:
    """A tool choice in any of the forms in use: `auto`, `none`, `any` or `required`, True, a name, or OpenAI's object.

    Raises UsageError for a name that no tool has, and for a choice without tools.
    """
    if choice is None or choice is False or choice in ("auto", "none"):
        return "none" if choice == "none" else "auto"
    if not tools:
        raise UsageError(f"The tool choice is {choice!r}, but there are no tools.", "Bind tools, or leave it out.")
    if choice is True or choice in ("any", "required"):
        return "any"
    name = choice if isinstance(choice, str) else choice.get("function", choice).get("name")
    names = [tool_name(tool) for tool in tools]
    if name not in names:
        raise UsageError(*unknown_name("tool", str(name), names))
    return (str(name),)


def call_grammar(tools: Sequence[Tool], choice: Choice, tokens: int, *, several: bool = True) -> Grammar | None:
    """What an answer may look like, within about `tokens` tokens; None when anything may come.

    A forced call is JSON alone, so every engine that knows JSON schemas can do it. With `auto` the text is free until
    the model begins a call, whose body is then held to the tools; `several` allows more than one.
    """
    if choice == "none" or not tools:
        return None
    if choice == "auto":
        return Grammar("lark", _free_text_with_calls(_call_schema(tools, tokens), several))
    wanted = [tool for tool in tools if choice == "any" or tool_name(tool) in choice]
    return Grammar("json_schema", _call_schema(wanted, tokens))


def _call_schema(tools: Sequence[Tool], tokens: int) -> dict[str, Any]:
    """The schema of one call to any of the tools."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        name = tool_name(tool)
        parameters = bounded(closed({"type": "object", **(tool["function"].get("parameters") or {})}), tokens - 24)
        arguments, own = split_definitions(parameters, name)
        definitions |= own
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


def _free_text_with_calls(schema: Mapping[str, Any], several: bool) -> str:
    """A Lark grammar in llguidance's dialect: the lazy lexeme ends where a call begins."""
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    body = json.dumps({**schema, "x-guidance": style}, ensure_ascii=False)
    return "\n".join(
        (
            "%llguidance {}",
            f"start: {'call* TEXT' if several else 'TEXT | call'}",
            f'call: begin "\\n" body "\\n{END}"',
            f"begin[lazy]: /(.|\\n)*{BEGIN}/",
            f"body: %json {body}",
            "TEXT: /(.|\\n)*/",
        )
    )


class CallReader:
    """Splits an answer, as it streams in, into text and calls.

    `forced` says that the whole answer is one call without tags. Text that may turn out to begin a tag is held back.
    """

    def __init__(self, forced: bool = False) -> None:
        self._forced = forced
        self._held = ""
        self._inside = forced

    def feed(self, text: str) -> Iterator[Part]:
        """What is certain after `text`."""
        self._held += text
        while not self._forced:
            tag = END if self._inside else BEGIN
            before, found, after = self._held.partition(tag)
            if not found:
                if not self._inside:
                    yield from self._release()
                return
            self._held = after
            if self._inside:
                yield read_call(before)
            elif before.strip():
                yield before
            self._inside = not self._inside

    def end(self) -> Iterator[Part]:
        """What is left when no more text comes."""
        if self._inside and (self._held.strip() or not self._forced):
            yield read_call(self._held)
        elif self._held and not self._inside:
            yield self._held
        self._held = ""

    def _release(self) -> Iterator[str]:
        """The held text up to where a tag may begin."""
        keep = next((n for n in range(len(BEGIN) - 1, 0, -1) if self._held.endswith(BEGIN[:n])), 0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        if certain:
            yield certain


def read_call(text: str) -> ToolCall | BrokenCall:
    """A call from its JSON."""
    try:
        value = json.loads(text)
        name, arguments = value["name"], value["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        return BrokenCall(text.strip(), f"not a tool call: {type(error).__name__}: {error}")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return BrokenCall(text.strip(), "not a tool call: 'name' must be a text and 'arguments' an object")
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(arguments, ensure_ascii=False))


def response_schema(response_format: Mapping[str, Any], tokens: int) -> Grammar | None:
    """The grammar of OpenAI's `response_format`: `text`, `json_object` or `json_schema`.

    Raises UsageError for another type or a missing schema.
    """
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_schema", {"type": "object"})
    if kind != "json_schema":
        raise UsageError(*unknown_name("response format", str(kind), ("text", "json_object", "json_schema")))
    schema = response_format.get("json_schema", {}).get("schema")
    if not isinstance(schema, Mapping):
        raise UsageError("The response format 'json_schema' has no schema.", "Put it at json_schema.schema.")
    return Grammar("json_schema", bounded(closed(schema), tokens))
