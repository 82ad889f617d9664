"""Sessions as files: Markdown to read, JSON with all branches, ShareGPT rows to train on; and back from the last two."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calpaca.core.errors import SessionError, UsageError
from calpaca.core.events import Source
from calpaca.core.sessions import Session, Sessions, StoredMessage

FORMS = (".md", ".json", ".jsonl")
_HEADINGS = {"system": "System text", "user": "Question", "assistant": "Answer"}
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
_ROLES = {name: role for role, name in _SHAREGPT.items()} | {role: role for role in _SHAREGPT}


def exported(session: Session, suffix: str) -> str:
    """A session's text: `.md` is the conversation as it stands, `.json` the whole tree, `.jsonl` a ShareGPT row of it.

    Raises UsageError for another suffix.
    """
    match suffix:
        case ".md":
            return _markdown(session)
        case ".json":
            return json.dumps(_tree(session), ensure_ascii=False, indent=2) + "\n"
        case ".jsonl":
            return json.dumps(_row(session), ensure_ascii=False) + "\n"
    raise UsageError(f"A session is not written as '{suffix}'.", f"Name a file that ends in {', '.join(FORMS)}.")


def _markdown(session: Session) -> str:
    parts = [f"# {session.record.title}"]
    for message in session.path():
        cut = "" if message.complete else " (not complete)"
        parts.append(f"## {_HEADINGS.get(message.role, message.role)}{cut}\n\n{message.content}{_sources(message)}")
    return "\n\n".join(parts) + "\n"


def _sources(message: StoredMessage) -> str:
    """What an answer about documents cites, else the passages that it rests on, as a list."""
    listed = message.metadata.get("citations") or message.metadata.get("sources") or []
    sources = [Source(each["source"], "", each.get("page"), each.get("start"), each.get("end")) for each in listed]
    lines = [
        f"{number}. {', '.join(filter(None, (each.source, each.place)))}" for number, each in enumerate(sources, 1)
    ]
    return "\n\n" + "\n".join(lines) if lines else ""


def _tree(session: Session) -> dict[str, Any]:
    record = session.record
    fields = ("id", "parent", "role", "content", "complete", "metadata", "created")
    messages = [{name: getattr(message, name) for name in fields} for message in session.tree()]
    return {"title": record.title, "setup": dict(record.setup), "head": session.head, "messages": messages}


def _row(session: Session) -> dict[str, Any]:
    said = [{"from": _SHAREGPT[message["role"]], "value": message["content"]} for message in session.messages()]
    return {"id": session.id, "conversations": said}


def imported(sessions: Sessions, file: Path) -> list[Session]:
    """New sessions from a file that `exported` wrote, or from ShareGPT rows or OpenAI messages.

    Raises SessionError that names the file for anything else; nothing is then kept of it.
    """
    try:
        values = _values(file.read_text(encoding="utf-8"))
        trees = [
            (_title(value, file), dict(value.get("setup") or {}), _messages(value), _head(value)) for value in values
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SessionError(f"{file} holds no session: {error}.", "Name a .json or .jsonl file of sessions.") from error
    return [sessions.restore(title, setup, messages, head) for title, setup, messages, head in trees]


def _values(text: str) -> list[Mapping[str, Any]]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def _title(value: Mapping[str, Any], file: Path) -> str:
    return str(value.get("title") or file.stem)


def _head(value: Mapping[str, Any]) -> int | None:
    return value["head"] if "head" in value else len(_said(value)) - 1


def _messages(value: Mapping[str, Any]) -> list[StoredMessage]:
    """The messages with the ids that they have in the file; those of a row are numbered from 0."""
    if "head" in value:
        return [StoredMessage(**message) for message in value["messages"]]
    return [
        StoredMessage(place, place - 1 if place else None, role, content, True, {}, 0.0)
        for place, (role, content) in enumerate(_said(value))
    ]


def _said(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: Iterable[Mapping[str, Any]] = value.get("conversations") or value["messages"]
    return [(_ROLES[row.get("from") or row["role"]], str(row.get("value", row.get("content")))) for row in rows]
