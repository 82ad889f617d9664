"""Stored responses: one SQLite file in WAL mode, which several processes may use at once."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, previous TEXT, response TEXT NOT NULL, input TEXT NOT NULL,
    created REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created);
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY REFERENCES responses (id) ON DELETE CASCADE, maker TEXT, events TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class Stored:
    """A response as clients see it, the items it was asked with, and the id of the one it continues.

    One that is made in the background has events, and, while it is being made, the name of the process that does it.
    """

    response: dict[str, Any]
    input: list[dict[str, Any]]
    previous: str | None = None
    maker: str | None = None
    events: list[dict[str, Any]] | None = None


class ResponseStore:
    """Responses of all keys. `owner` is whose they are: nobody else reads, continues or deletes them.

    At most `most` are kept, none for longer than `seconds`. Raises sqlite3.Error where the file cannot be used.
    """

    def __init__(self, path: Path, most: int, seconds: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite gives its -wal and -shm files the same mode
        path.chmod(0o600)
        self._path = path
        self._most = most
        self._seconds = seconds
        with self._connection() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=30)) as connection, connection:
            connection.execute("PRAGMA foreign_keys = ON")
            yield connection

    def add(self, owner: str, stored: Stored) -> None:
        """Keep a new response; the oldest go where there is no room."""
        id = stored.response["id"]
        row = (id, owner, stored.previous, _text(stored.response), _text(stored.input), time.time())
        with self._connection() as connection:
            connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)
            if stored.maker is not None:
                connection.execute("INSERT INTO runs VALUES (?, ?, '[]')", (id, stored.maker))
            connection.execute("DELETE FROM responses WHERE created < ?", (time.time() - self._seconds,))
            connection.execute(
                "DELETE FROM responses WHERE rowid IN"
                " (SELECT rowid FROM responses ORDER BY created DESC, rowid DESC LIMIT -1 OFFSET ?)",
                (self._most,),
            )

    def end(self, response: dict[str, Any], events: list[dict[str, Any]]) -> None:
        """Keep the end of a response that was made in the background; nothing where it was deleted meanwhile."""
        with self._connection() as connection:
            connection.execute("UPDATE responses SET response = ? WHERE id = ?", (_text(response), response["id"]))
            connection.execute("UPDATE runs SET maker = NULL, events = ? WHERE id = ?", (_text(events), response["id"]))

    def find(self, owner: str, id: str) -> Stored | None:
        with self._connection() as connection:
            row = connection.execute(
                "SELECT response, input, previous, maker, events FROM responses LEFT JOIN runs USING (id)"
                " WHERE id = ? AND owner = ? AND created >= ?",
                (id, owner, time.time() - self._seconds),
            ).fetchone()
        if row is None:
            return None
        response, items, previous, maker, events = row
        return Stored(json.loads(response), json.loads(items), previous, maker, events and json.loads(events))

    def delete(self, owner: str, id: str) -> bool:
        """Whether there was one."""
        with self._connection() as connection:
            return connection.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (id, owner)).rowcount == 1


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
