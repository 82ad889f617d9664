"""What an index holds: which files in which state, their chunks, and the words and vectors that these are found by."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from langchain_core.documents import Document
from numpy.typing import NDArray

from calpaca.core.errors import DocumentError
from calpaca.documents import keywords
from calpaca.documents.search import ChunkFilter

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, path TEXT NOT NULL, page INTEGER, heading TEXT
);
CREATE INDEX IF NOT EXISTS chunks_of_file ON chunks (path);
CREATE TABLE IF NOT EXISTS vectors (number INTEGER PRIMARY KEY, dimensions INTEGER NOT NULL, rows BLOB NOT NULL);
"""
_ANNOUNCE = """
INSERT INTO chunks (id, path, page, heading) VALUES (?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET path = excluded.path, page = excluded.page, heading = excluded.heading
"""
_BLOCK = 4096
"""Chunks whose vectors are compared with a question at once."""


@dataclass(frozen=True)
class IndexedChunk:
    """What a chunk is found by: its text, and vectors [1 + sentences, dimensions], its own in front."""

    text: str
    vectors: NDArray[np.float32]


class Manifest:
    """One SQLite file beside the store.

    Vectors are kept here too, as float16, a chunk's own first and then those of its sentences: stores do not give out
    theirs, nor do they know sentences.

    Ids are written down before the store gets them and struck out after it has lost them; from the first of these to the
    last a file has no digest. So after a crash the manifest may name chunks that the store lacks, never the other way
    round, and the file counts as changed.
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

    def announce(self, chunks: Mapping[str, tuple[str, Document]]) -> None:
        """Write down chunks that the store is about to get, by id, with the path of their file."""
        rows = [
            (name, path, chunk.metadata.get("page"), chunk.metadata.get("heading"))
            for name, (path, chunk) in chunks.items()
        ]
        with self._connection() as connection:
            connection.executemany("DELETE FROM files WHERE path = ?", {(path,) for path, _ in chunks.values()})
            connection.executemany(_ANNOUNCE, rows)

    def write(self, chunks: Mapping[str, IndexedChunk]) -> None:
        """Keep words and vectors of announced chunks, given by id, which the store has now."""
        with self._connection() as connection:
            numbers = _numbers(connection, chunks)
            keywords.write(connection, {number: chunks[name].text for name, number in numbers.items()})
            rows = [(number, *_packed(chunks[name].vectors)) for name, number in numbers.items()]
            connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    def finish(self, digests: Mapping[str, str], stale: Iterable[str]) -> None:
        """The store has all chunks of these files, and no longer the stale ones."""
        with self._connection() as connection:
            _strike_out(connection, stale)
            connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?)", list(digests.items()))

    def forget(self, paths: Sequence[str]) -> None:
        """The store has nothing of these files any more."""
        stale = self.chunk_ids(paths)
        with self._connection() as connection:
            _strike_out(connection, stale)
            connection.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in paths])

    # Searching -----------------------------------------------------------------------------------------------------
    def search(self, question: str, k: int, where: ChunkFilter = ChunkFilter()) -> dict[str, float]:
        """Ids of the `k` chunks with most of the question's words (BM25), with their share of these, the best first."""
        condition, parameters = where.condition()
        among = f"SELECT number FROM chunks WHERE {condition}" if where else ""  # noqa: S608  # SQL of our own
        with self._connection() as connection:
            found = keywords.best(connection, question, k, among, parameters)
            names = _ids(connection, [number for number, _ in found])
        return {names[number]: share for number, share in found if number in names}

    def vectors(self, names: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """[1 + sentences, dimensions] by id, a chunk's own vector in front, of those chunks that are there."""
        found: dict[str, NDArray[np.float32]] = {}
        query = "SELECT dimensions, rows FROM vectors JOIN chunks USING (number) WHERE id = ?"
        with self._connection() as connection:
            for name in dict.fromkeys(names):
                row = connection.execute(query, (name,)).fetchone()
                if row is not None:
                    found[name] = _unpacked(*row)
        return found

    def nearest(self, query: NDArray[np.float32], k: int, where: ChunkFilter) -> dict[str, float]:
        """Ids of the `k` chunks that the filter lets through and are most similar to a question, with their cosines, the
        best first. Every one of them is compared.
        """
        condition, parameters = where.condition()
        statement = f"SELECT id, dimensions, rows FROM vectors JOIN chunks USING (number) WHERE {condition}"  # noqa: S608  # SQL of our own
        best: dict[str, float] = {}
        with self._connection() as connection:
            cursor = connection.execute(statement, parameters)
            while block := cursor.fetchmany(_BLOCK):
                own = np.stack([np.frombuffer(rows, np.float16, dimensions) for _, dimensions, rows in block])
                cosines = own.astype(np.float32) @ query / max(float(np.linalg.norm(query)), 1e-12)
                best |= {name: float(cosine) for (name, _, _), cosine in zip(block, cosines, strict=True)}
                best = dict(sorted(best.items(), key=lambda item: -item[1])[:k])
        return best


def _strike_out(connection: sqlite3.Connection, names: Iterable[str]) -> None:
    numbers = [(number,) for number in _numbers(connection, names).values()]
    keywords.delete(connection, [number for (number,) in numbers])
    for table in ("vectors", "chunks"):
        connection.executemany(f"DELETE FROM {table} WHERE number = ?", numbers)  # noqa: S608  # names of our own


def _numbers(connection: sqlite3.Connection, names: Iterable[str]) -> dict[str, int]:
    """Numbers of chunks by id, of those that are there."""
    rows = ((name, connection.execute("SELECT number FROM chunks WHERE id = ?", (name,)).fetchone()) for name in names)
    return {name: row[0] for name, row in rows if row is not None}


def _ids(connection: sqlite3.Connection, numbers: Iterable[int]) -> dict[int, str]:
    rows = ((n, connection.execute("SELECT id FROM chunks WHERE number = ?", (n,)).fetchone()) for n in numbers)
    return {number: row[0] for number, row in rows if row is not None}


def _packed(vectors: NDArray[np.float32]) -> tuple[int, bytes]:
    return vectors.shape[1], vectors.astype(np.float16).tobytes()


def _unpacked(dimensions: int, rows: bytes) -> NDArray[np.float32]:
    return np.frombuffer(rows, np.float16).reshape(-1, dimensions).astype(np.float32)
