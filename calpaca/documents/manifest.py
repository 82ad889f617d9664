"""What an index holds: which files in which state, the ids of their chunks, and the words that these are found by."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from calpaca.core.errors import DocumentError
from calpaca.documents import keywords

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, path TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS chunks_of_file ON chunks (path);
"""
_ANNOUNCE = "INSERT INTO chunks (id, path) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET path = excluded.path"


class Manifest:
    """One SQLite file beside the store.

    Ids are written down before the store gets them and struck out after it has lost them; a file's digest is written
    last, in one transaction with the words of its chunks. So after a crash the manifest may name chunks that the store
    lacks, never the other way round, and the file counts as changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._connection() as connection:
            connection.executescript(_SCHEMA + keywords.SCHEMA)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise DocumentError(
                f"The index {self.path.parent} cannot be used: {error}.",
                "Free disk space or check the permissions; CALPACA_CACHE moves it. A damaged one may be deleted.",
            ) from error

    def files(self) -> dict[str, str]:
        """sha256 of each file that is indexed completely."""
        with self._connection() as connection:
            return dict(connection.execute("SELECT path, sha256 FROM files").fetchall())

    def paths(self) -> set[str]:
        """Files that have chunks, those of an unfinished run included."""
        with self._connection() as connection:
            rows = connection.execute("SELECT path FROM files UNION SELECT path FROM chunks").fetchall()
        return {row[0] for row in rows}

    def chunk_ids(self, paths: Iterable[str]) -> set[str]:
        """Ids of the chunks of these files."""
        with self._connection() as connection:
            rows = [connection.execute("SELECT id FROM chunks WHERE path = ?", (path,)).fetchall() for path in paths]
        return {row[0] for found in rows for row in found}

    def __len__(self) -> int:
        """Chunks."""
        with self._connection() as connection:
            return int(connection.execute("SELECT count(*) FROM chunks").fetchone()[0])

    def announce(self, chunks: Mapping[str, str]) -> None:
        """Write down ids, with their files, that the store is about to get."""
        with self._connection() as connection:
            connection.executemany(_ANNOUNCE, list(chunks.items()))

    def finish(
        self,
        digests: Mapping[str, str],
        texts: Mapping[str, str],
        stale: Iterable[str],
        gone: Sequence[str] = (),
    ) -> None:
        """The store has the chunks of these files, whose texts by id are given, and no longer the stale ones; `gone`
        files are out of the index.
        """
        with self._connection() as connection:
            old = _numbers(connection, stale)
            keywords.delete(connection, old.values())
            connection.executemany("DELETE FROM chunks WHERE number = ?", [(number,) for number in old.values()])
            keywords.write(connection, {number: texts[name] for name, number in _numbers(connection, texts).items()})
            connection.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in gone])
            connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?)", list(digests.items()))

    def search(self, question: str, k: int) -> list[str]:
        """Ids of the `k` chunks with most of the question's words (BM25), the best first."""
        with self._connection() as connection:
            numbers = keywords.best(connection, question, k)
            rows = [
                connection.execute("SELECT id FROM chunks WHERE number = ?", (each,)).fetchone() for each in numbers
            ]
        return [row[0] for row in rows]


def _numbers(connection: sqlite3.Connection, names: Iterable[str]) -> dict[str, int]:
    """Numbers of chunks by id, of those that are there."""
    found: dict[str, int] = {}
    for name in names:
        row = connection.execute("SELECT number FROM chunks WHERE id = ?", (name,)).fetchone()
        if row is not None:
            found[name] = row[0]
    return found
