"""What a model is asked in bulk: one instruction per line of a text file, or one per row of a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from calpaca.core.errors import CalpacaError, UsageError
from calpaca.core.template import Message

LINE = "instruction"
"""The name by which a template calls a line of a text file."""

_TEXTS = ("prompt", LINE, "question")
_SHOWN = 3
_ROWS = {".json", ".jsonl", ".ndjson"}


@dataclass(frozen=True)
class Instruction:
    """A row as it was read, and what the model is asked: a text, or the messages of a conversation."""

    row: str | Mapping[str, Any]
    asked: str | tuple[Message, ...]


def read_instructions(text: str, name: str, template: str | None = None) -> list[Instruction]:
    """The instructions of a file's text; `name` tells its form: `.json`, `.jsonl` or one instruction per line.

    A row is an object. `template` makes its instruction, with the row's fields in braces ("Translate: {text}"; a line
    is called {instruction}); without one, the row's `messages`, `prompt`, `instruction` (and `input`) or `question`
    is taken. Lines without text are left out. Raises UsageError that names the lines at fault.
    """
    read = _numbered_rows(text, name) if Path(name).suffix.lower() in _ROWS else _numbered_lines(text)
    instructions, faults = [], []
    for number, row in read:
        try:
            instructions.append(Instruction(row, _asked(row, template)))
        except CalpacaError as error:
            faults.append(f"{name}:{number}: {error.message}")
    if faults:
        others = f" So are {len(faults) - _SHOWN} others." if len(faults) > _SHOWN else ""
        raise UsageError(" ".join(faults[:_SHOWN]) + others, "Correct them, or name the fields with --template.")
    if not instructions:
        raise UsageError(f"{name} holds no instruction.", "Write one on each line.")
    return instructions


def _numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def _numbered_rows(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """The values of a JSON list, or of the lines of a JSONL file whatever it is called."""
    if text.lstrip().startswith("["):
        yield from enumerate(_parsed(text, name), 1)
        return
    for number, line in _numbered_lines(text):
        yield number, _parsed(line, f"{name}:{number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{place} is not valid JSON: {error}.", "Each line must be one JSON object.") from error


def _asked(row: Any, template: str | None) -> str | tuple[Message, ...]:
    fields = {LINE: row} if isinstance(row, str) else row
    if not isinstance(fields, Mapping):
        raise UsageError(f"the row is no JSON object but {json.dumps(row)[:40]}.")
    if template is not None:
        return _filled(template, fields)
    if "messages" in fields:
        return _conversation(fields["messages"])
    text = next((str(fields[name]) for name in _TEXTS if fields.get(name)), None)
    if text is None:
        raise UsageError(f"the row has none of {', '.join(('messages', *_TEXTS))}; its fields: {', '.join(fields)}.")
    return f"{text}\n{fields['input']}" if fields.get("input") else text  # as Stanford Alpaca's rows are read


def _filled(template: str, fields: Mapping[str, Any]) -> str:
    """The template with the row's fields; only plain names are taken, no attributes or indices of them."""
    pieces = []
    try:
        for literal, name, form, conversion in Formatter().parse(template):
            if form or conversion:
                raise ValueError("a field has a name alone in its braces")
            pieces.append(literal)
            if name is not None:
                pieces.append(str(fields[name]))
    except KeyError as error:
        raise UsageError(f"the row has no field {error.args[0]!r}; its fields: {', '.join(fields)}.") from error
    except ValueError as error:
        raise UsageError(f"the template {template!r} cannot be read: {error}.") from error
    return "".join(pieces)


def _conversation(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise UsageError("its messages are no list of objects with the texts `role` and `content`.")
    return tuple(messages)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))
