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


def answer_grammar(
    tools: Sequence[Tool],
    choice: Choice,
    response_format: Mapping[str, Any] | None = None,
    *,
    tokens: int,
    several: bool = True,
) -> Grammar | None:
    """What an answer may look like, within about `tokens` tokens; None when anything may come.

    A forced call is JSON alone, so every engine that knows JSON schemas can do it. With `auto` the text is free until
    the model begins a call, whose body is then held to the tools; `several` allows more than one. `response_format` is
    OpenAI's and takes the place of the free text. Raises UsageError for a wrong one.
    """
    answer = _format_schema(response_format, tokens) if response_format is not None else None
    if choice == "none" or not tools:
        return Grammar("json_schema", answer) if answer is not None else None
    if choice == "auto":
        return Grammar("lark", _calls_or_answer(_call_schema(tools, tokens), answer, several))
    wanted = [tool for tool in tools if choice == "any" or tool_name(tool) in choice]
    return Grammar("json_schema", _call_schema(wanted, tokens))


def _format_schema(response_format: Mapping[str, Any], tokens: int) -> dict[str, Any] | None:
    """The schema of OpenAI's `response_format`: `text` (None), `json_object` or `json_schema`."""
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise UsageError(*unknown_name("response format", str(kind), ("text", "json_object", "json_schema")))
    schema = response_format.get("json_schema", {}).get("schema")
    if not isinstance(schema, Mapping):
        raise UsageError("The response format 'json_schema' has no schema.", "Put it at json_schema.schema.")
    return bounded(closed(schema), tokens)


def describe_format(response_format: Mapping[str, Any]) -> list[dict[str, str]]:
    """A system message that tells the model what its grammar will hold it to; without it the values are guesses."""
    schema = response_format.get("json_schema", {}).get("schema")
    if response_format.get("type") == "text":
        return []
    text = "Answer with a JSON object"
    text += f" that fits this JSON schema:\n{json.dumps(schema, ensure_ascii=False)}" if schema else "."
    return [{"role": "system", "content": text}]


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


_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _calls_or_answer(call: Mapping[str, Any], answer: Mapping[str, Any] | None, several: bool) -> str:
    """A Lark grammar in llguidance's dialect. A lazy lexeme ends where it first matches: where a call begins."""
    calls = "call+" if several else "call"
    free = "call* TEXT" if several else "TEXT | call"
    rules = [
        "%llguidance {}",
        f"start: {free if answer is None else f'{calls} | answer'}",
        f'call: begin "\\n" body "\\n{END}"',
        f"begin[lazy]: /(.|\\n)*{BEGIN}/" if answer is None else f'begin: /\\n?/ "{BEGIN}"',
        f"body: {_json_rule(call)}",
        "TEXT: /(.|\\n)*/" if answer is None else f"answer: {_json_rule(answer)}",
    ]
    return "\n".join(rules)


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_STYLE}, ensure_ascii=False)


class CallReader:
    """Splits an answer, as it streams in, into text and calls.

    `forced` says that the whole answer is one call without tags. Text that may turn out to begin a tag is held back.
    """

    def __init__(self, forced: bool = False) -> None:
        self._forced = forced
        self._held = ""
        self._inside = forced
        self._called = False

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
                self._called = True
            elif before.strip():
                yield before
            self._inside = not self._inside

    def end(self) -> Iterator[Part]:
        """What is left when no more text comes."""
        if self._inside and (self._held.strip() or not self._forced):
            yield read_call(self._held)
        elif not self._inside and (self._held.strip() if self._called else self._held):
            yield self._held
        self._held = ""

    def _release(self) -> Iterator[str]:
        """The held text up to where a tag may begin. White space that only sets calls apart is dropped."""
        if self._called:
            self._held = self._held.lstrip()
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
