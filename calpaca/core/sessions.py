"""Conversations that are kept: each a tree of messages, in one SQLite file.

An edited question or another answer is a sibling of the first one; `head` is the message that the conversation stands at,
and its path to the root is what the model is shown. An answer is written piece by piece as it comes, so that a kill loses
nothing that was shown: what was written of it stands there, marked as not complete.
"""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calpaca.core.errors import SessionError, UsageError, unknown_name
from calpaca.core.template import Message

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, setup TEXT NOT NULL, head INTEGER, created REAL NOT NULL, updated REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE,
    parent INTEGER REFERENCES messages ON DELETE CASCADE, role TEXT NOT NULL, content TEXT NOT NULL,
    complete INTEGER NOT NULL, metadata TEXT NOT NULL, created REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS messages_by_parent ON messages (session, parent);
CREATE TABLE IF NOT EXISTS pieces (
    message INTEGER NOT NULL REFERENCES messages ON DELETE CASCADE, text TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS pieces_by_message ON pieces (message);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (text, tokenize = 'unicode61');
CREATE TRIGGER IF NOT EXISTS forget_words AFTER DELETE ON messages BEGIN DELETE FROM words WHERE rowid = old.id; END;
"""
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
"""Characters of scripts that put no spaces between words; each is looked up as a word, a text as the phrase of its own."""
_TITLE = 60


@dataclass(frozen=True)
class StoredMessage:
    """A message of a tree. `complete` is False for an answer that was cut short."""

    id: int
    parent: int | None
    role: str
    content: str
    complete: bool
    metadata: Mapping[str, Any]
    created: float

    def as_message(self) -> Message:
        """As a chat template takes it: what was attached stands before what was said."""
        attached = [f"{each['name']}:\n\n{each['text']}" for each in self.metadata.get("attachments", ())]
        return {"role": self.role, "content": "\n\n".join([*attached, self.content])}


@dataclass(frozen=True)
class SessionRecord:
    """A session as it is listed. `setup` is what it was begun with: model, adapters, sampling, system text."""

    id: str
    title: str
    setup: Mapping[str, Any]
    messages: int
    created: float
    updated: float


@dataclass(frozen=True)
class Found:
    """A message that holds what was looked for, and its session."""

    session: SessionRecord
    message: StoredMessage


class Sessions:
    """All sessions of a person. Thread-safe; several processes may use one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        with self.transaction() as connection:
            connection.executescript(_SCHEMA)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection in a transaction. A full disk or a damaged file is a SessionError.

        Commits survive a kill of the process; only a power cut may take the last moments.
        """
        try:
            connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
            if connection is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                connection = self._local.connection = sqlite3.connect(self.path, timeout=30)
                connection.row_factory = sqlite3.Row
                connection.executescript(
                    "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON; PRAGMA recursive_triggers=ON;"
                )
            with connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise SessionError(
                f"The sessions in {self.path} cannot be used: {error}.",
                "Free disk space or check the permissions; CALPACA_DATA moves them.",
            ) from error

    def new(self, setup: Mapping[str, Any], title: str = "") -> Session:
        """Begin a session. Left out, its title is the beginning of the first question."""
        session_id, now = secrets.token_hex(4), time.time()
        with self.transaction() as connection:
            connection.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, NULL, ?, ?)", (session_id, title, _json(setup), now, now)
            )
        return Session(self, session_id)

    def records(self, limit: int = -1) -> list[SessionRecord]:
        """The sessions, the one used last first."""
        with self.transaction() as connection:
            rows = connection.execute(_RECORDS + " GROUP BY s.id ORDER BY s.updated DESC LIMIT ?", (limit,)).fetchall()
        return [_record(row) for row in rows]

    def named(self, name: str) -> list[SessionRecord]:
        """The sessions of that title; without one, those whose id begins like that."""
        records = self.records()
        return [record for record in records if record.title == name] or [
            record for record in records if record.id.startswith(name)
        ]

    def find(self, name: str) -> Session:
        """The one session that is `named` so. Raises SessionError when there is none or several."""
        matches = self.named(name)
        if len(matches) == 1:
            return Session(self, matches[0].id)
        if matches:
            ids = ", ".join(f"{record.id} ({record.title})" for record in matches[:9])
            raise SessionError(f"'{name}' names {len(matches)} sessions.", f"Which one: {ids}?")
        raise SessionError(*unknown_name("session", name, [record.title or record.id for record in self.records()]))

    def resume(self, title: str, setup: Mapping[str, Any]) -> Session:
        """The session of that title or id, or a new one of that title. Raises SessionError when several have it."""
        exact = [record for record in self.named(title) if title in (record.title, record.id)]
        return self.find(title) if exact else self.new(setup, title)

    def search(self, text: str, limit: int = 50) -> list[Found]:
        """Messages that hold all words of `text`, the last one perhaps only begun; the newest first."""
        query = " ".join(_phrase(word) for word in text.split() if _phrase(word))
        if not query:
            return []
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT m.*, m.session FROM words JOIN messages m ON m.id = words.rowid"
                " WHERE words MATCH ? ORDER BY m.id DESC LIMIT ?", (query + "*", limit),
            ).fetchall()  # fmt: skip
        records = {record.id: record for record in self.records()} if rows else {}
        return [Found(records[row["session"]], _message(row)) for row in rows]

    def restore(
        self, title: str, setup: Mapping[str, Any], messages: Sequence[StoredMessage], head: int | None
    ) -> Session:
        """A new session with the tree that `messages` are, parents before their children. Raises KeyError for a gap."""
        session = self.new(setup, title)
        ids: dict[int | None, int | None] = {None: None}
        for message in messages:
            ids[message.id] = session.insert(ids[message.parent], message).id
        session.go_to(ids[head])
        return session

    def delete(self, session_id: str) -> None:
        with self.transaction() as connection:
            connection.execute("DELETE FROM sessions WHERE id = ?", (session_id,))

    def discard_empty(self, session_id: str) -> None:
        """Delete a session in which nothing was said."""
        with self.transaction() as connection:
            connection.execute(
                "DELETE FROM sessions WHERE id = ? AND NOT EXISTS (SELECT 1 FROM messages WHERE session = sessions.id)",
                (session_id,),
            )


class Session:
    """One conversation. What it says of itself is read from the file, so that two windows on it agree."""

    def __init__(self, sessions: Sessions, session_id: str) -> None:
        self._sessions = sessions
        self.id = session_id

    @property
    def record(self) -> SessionRecord:
        with self._sessions.transaction() as connection:
            row = connection.execute(_RECORDS + " WHERE s.id = ? GROUP BY s.id", (self.id,)).fetchone()
        if row is None:
            raise SessionError(f"The session {self.id} is gone.", "Another window has deleted it.")
        return _record(row)

    @property
    def head(self) -> int | None:
        """The message that the conversation stands at; None before the first one."""
        with self._sessions.transaction() as connection:
            row = connection.execute("SELECT head FROM sessions WHERE id = ?", (self.id,)).fetchone()
        return None if row is None else row["head"]

    def path(self) -> list[StoredMessage]:
        """The conversation as it stands: the messages from the first one to the head."""
        by_id = {message.id: message for message in self.tree()}
        path, at = [], self.head
        while at is not None:
            path.append(by_id[at])
            at = by_id[at].parent
        return path[::-1]

    def messages(self) -> list[Message]:
        """The conversation as a model is shown it: the set-up's system text stands first where the path has none."""
        path = self.path()
        system = self.record.setup.get("system")
        begins = not (path and path[0].role == "system") and system
        return [{"role": "system", "content": system}] * bool(begins) + [message.as_message() for message in path]

    def set_up(self, setup: Mapping[str, Any]) -> None:
        """Keep what the conversation is held with from now on."""
        with self._sessions.transaction() as connection:
            connection.execute("UPDATE sessions SET setup = ? WHERE id = ?", (_json(setup), self.id))

    def set_system(self, text: str) -> None:
        """Change the system text of the whole conversation; it is the set-up's where no message holds it."""
        first = next(iter(self.path()), None)
        if first is None or first.role != "system":
            self.set_up({**self.record.setup, "system": text})
            return
        with self._sessions.transaction() as connection:
            connection.execute("UPDATE messages SET content = ? WHERE id = ?", (text, first.id))
            _index(connection, first.id, text)

    def tree(self) -> list[StoredMessage]:
        """All messages of all branches, the oldest first."""
        with self._sessions.transaction() as connection:
            rows = connection.execute("SELECT * FROM messages WHERE session = ? ORDER BY id", (self.id,)).fetchall()
            written = connection.execute(
                "SELECT p.message, p.text FROM pieces p JOIN messages m ON m.id = p.message WHERE m.session = ? ORDER BY p.rowid",
                (self.id,),
            ).fetchall()
        pieces: dict[int, str] = {}
        for row in written:
            pieces[row["message"]] = pieces.get(row["message"], "") + row["text"]
        return [_message(row, pieces.get(row["id"], "")) for row in rows]

    def siblings(self, message_id: int) -> list[StoredMessage]:
        """The message and what stands in its place on other branches, the oldest first."""
        tree = self.tree()
        parent = self._of(tree, message_id).parent
        return [message for message in tree if message.parent == parent]

    def add(self, role: str, content: str, metadata: Mapping[str, Any] | None = None) -> StoredMessage:
        """Put a message after the head, which it becomes."""
        return self._insert(self.head, role, content, metadata or {}, complete=True)

    def extend(self, messages: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
        """Put messages after the head, (role, content, metadata) each: all of them or, where that fails, none."""
        with self._sessions.transaction() as connection:
            # Written first, so that no other window moves the head meanwhile.
            connection.execute("UPDATE sessions SET updated = ? WHERE id = ?", (time.time(), self.id))
            row = connection.execute("SELECT head FROM sessions WHERE id = ?", (self.id,)).fetchone()
            parent = (
                row["head"] if row is not None else None
            )  # of a session that is gone; SQLite then refuses the message
            for role, content, metadata in messages:
                parent = self._write(connection, parent, role, content, metadata, complete=True).id

    def edit(self, message_id: int, content: str) -> StoredMessage:
        """Begin a branch: another message in the place of one, which stays on its own branch."""
        message = self._of(self.tree(), message_id)
        return self._insert(message.parent, message.role, content, message.metadata, complete=True)

    def begin_answer(self, metadata: Mapping[str, Any] | None = None) -> AnswerInHand:
        """Put an answer after the head that is written as it comes."""
        message = self._insert(self.head, "assistant", "", metadata or {}, complete=False)
        return AnswerInHand(self._sessions, message.id)

    def go_to(self, message_id: int | None) -> None:
        """Stand at a message, or before the first one: what is said next continues from there."""
        if message_id is not None:
            self._of(self.tree(), message_id)
        with self._sessions.transaction() as connection:
            connection.execute("UPDATE sessions SET head = ? WHERE id = ?", (message_id, self.id))

    def walk_to(self, message_id: int) -> None:
        """Stand at the end of a message's branch: of several ends, the newest."""
        tree = self.tree()
        at = self._of(tree, message_id).id
        for message in tree:  # children come after their parents
            if message.parent == at:
                at = max(each.id for each in tree if each.parent == at)
        self.go_to(at)

    def rename(self, title: str) -> None:
        with self._sessions.transaction() as connection:
            connection.execute("UPDATE sessions SET title = ? WHERE id = ?", (" ".join(title.split()), self.id))

    def fork(self) -> Session:
        """A new session with the conversation as it stands; other branches stay behind."""
        record = self.record
        copy = self._sessions.new(record.setup, f"{record.title} (fork)")
        for message in self.path():
            copy.insert(copy.head, message)
        return copy

    def insert(self, parent: int | None, message: StoredMessage) -> StoredMessage:
        """Put a copy of a message after `parent`, and stand at it."""
        return self._insert(parent, message.role, message.content, message.metadata, complete=message.complete)

    def _of(self, tree: Sequence[StoredMessage], message_id: int) -> StoredMessage:
        for message in tree:
            if message.id == message_id:
                return message
        raise UsageError(f"Session {self.id} has no message {message_id}.", "Its tree lists those it has.")

    def _insert(
        self, parent: int | None, role: str, content: str, metadata: Mapping[str, Any], *, complete: bool
    ) -> StoredMessage:
        with self._sessions.transaction() as connection:
            return self._write(connection, parent, role, content, metadata, complete=complete)

    def _write(
        self, connection: sqlite3.Connection, parent: int | None, role: str, content: str, metadata: Mapping[str, Any],
        *, complete: bool,
    ) -> StoredMessage:  # fmt: skip
        now = time.time()
        cursor = connection.execute(
            "INSERT INTO messages (session, parent, role, content, complete, metadata, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (self.id, parent, role, content, complete, _json(metadata), now),
        )
        message_id = cursor.lastrowid
        assert message_id is not None
        _index(connection, message_id, content)
        connection.execute(
            "UPDATE sessions SET head = ?, updated = ?, title = iif(title = '' AND ? = 'user', ?, title) WHERE id = ?",
            (message_id, now, role, _title(content), self.id),
        )
        return StoredMessage(message_id, parent, role, content, complete, metadata, now)


class AnswerInHand:
    """An answer that is being written; `text` is what there is of it. It is complete when `finish` has been called."""

    def __init__(self, sessions: Sessions, message_id: int) -> None:
        self._sessions = sessions
        self.id = message_id
        self.text = ""

    def write(self, text: str) -> None:
        """Keep a piece; call this before it is shown."""
        if text:
            self.text += text
            with self._sessions.transaction() as connection:
                connection.execute("INSERT INTO pieces VALUES (?, ?)", (self.id, text))

    def rewrite(self, text: str) -> None:
        """Put a text in the place of all that was written."""
        with self._sessions.transaction() as connection:
            connection.execute("DELETE FROM pieces WHERE message = ?", (self.id,))
            connection.execute("INSERT INTO pieces VALUES (?, ?)", (self.id, text))
        self.text = text

    def finish(self, metadata: Mapping[str, Any], *, complete: bool = True) -> None:
        """Put the pieces together; `complete` is False for an answer that was stopped."""
        with self._sessions.transaction() as connection:
            connection.execute(
                "UPDATE messages SET content = ?, complete = ?, metadata = ? WHERE id = ?",
                (self.text, complete, _json(metadata), self.id),
            )
            connection.execute("DELETE FROM pieces WHERE message = ?", (self.id,))
            _index(connection, self.id, self.text)


_RECORDS = (
    "SELECT s.id, s.title, s.setup, s.created, s.updated, COUNT(m.id) AS messages"
    " FROM sessions s LEFT JOIN messages m ON m.session = s.id"
)


def _record(row: sqlite3.Row) -> SessionRecord:
    return SessionRecord(
        row["id"], row["title"], json.loads(row["setup"]), row["messages"], row["created"], row["updated"]
    )


def _message(row: sqlite3.Row, written: str = "") -> StoredMessage:
    return StoredMessage(
        row["id"], row["parent"], row["role"], row["content"] + written, bool(row["complete"]),
        json.loads(row["metadata"]), row["created"],
    )  # fmt: skip


def _index(connection: sqlite3.Connection, message_id: int, content: str) -> None:
    connection.execute("INSERT OR REPLACE INTO words (rowid, text) VALUES (?, ?)", (message_id, _spaced(content)))


def _spaced(text: str) -> str:
    return _UNSPACED.sub(r" \g<0> ", text)


def _phrase(word: str) -> str:
    """A word as FTS5 looks it up: its characters one after the other where the script puts no spaces; '' without any."""
    inner = " ".join(re.findall(r"\w+", _spaced(word)))
    return f'"{inner}"' if inner else ""


def _title(content: str) -> str:
    line = " ".join(content.split())
    return line if len(line) <= _TITLE else line[: _TITLE - 1] + "…"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), ensure_ascii=False)
