"""A vector store on disk: documents and vectors in one SQLite file, searched with FAISS.

SQLite holds everything and every change is one transaction, so a crash leaves the state before it or after it. Up to
`EXACT_UP_TO` vectors are compared one by one, in memory; they are read when the store is first searched and again after
a change, also one by another process. Past that an inverted file beside the store chooses candidates, which are then
compared exactly. Nothing is pickled.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from numpy.typing import NDArray

from calpaca.core.errors import DocumentError
from calpaca.documents.stores.inverted_file import Block, InvertedFile, newest, sample_size, write

FILE = "vectors.sqlite"
EXACT_UP_TO = 50_000
"""Vectors that are compared one by one: 77 MB of 384 numbers each, 5 ms."""

_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, text TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS vectors (number INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TRIGGER IF NOT EXISTS vector_of_document AFTER DELETE ON documents BEGIN
    DELETE FROM vectors WHERE number = old.number;
END;
"""
_INSERT = "INSERT INTO documents (id, text, metadata) VALUES (?, ?, ?)"
_DELETE = "DELETE FROM documents WHERE id = ?"
_BLOCK = 8192
"""Vectors that are read at once."""

_MOST_BEHIND = 0.2
"""Share of an inverted file that may be gone, or come after it, before it is made anew."""

_CHOICE = 100
"""Candidates of an inverted file that are compared exactly, at least."""


def open_store(folder: Path, embeddings: Embeddings) -> FaissStore:
    """The store in a folder, which is made where it is missing. Raises DocumentError."""
    folder.mkdir(parents=True, exist_ok=True)
    return FaissStore(embeddings, folder / FILE)


class FaissStore(VectorStore):
    """Search by cosine similarity, which is the score everywhere: 1.0 is the same direction.

    Adding an id that is there replaces its document; deleting one that is not does nothing. Metadata is kept as JSON:
    a value that JSON does not know is kept as its text. Safe to use from several threads and processes.
    """

    def __init__(self, embeddings: Embeddings, path: Path | None = None) -> None:
        """Without a path the store lives in memory. Raises DocumentError when the file is no store."""
        self._embeddings = embeddings
        self._path = path
        self._lock = threading.RLock()
        self._numbers: NDArray[np.int64] = np.zeros(
            0, np.int64
        )  # of the vectors in memory, all or those after the file
        self._index: Any = None  # over them
        self._file: InvertedFile | None = None
        self._version: tuple[int, int] | None = None
        with self._translated():
            self._connection = sqlite3.connect(path or ":memory:", timeout=30, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._make_tables()

    def _make_tables(self) -> None:
        # One statement sees one state: another process may be making the tables now, all of them at once.
        version, tables = self._connection.execute(
            "SELECT user_version, EXISTS (SELECT 1 FROM sqlite_master WHERE name = 'documents') FROM pragma_user_version"
        ).fetchone()
        if version == _VERSION:
            return  # and nothing is written: a store on a full disk can be read
        if tables:
            raise DocumentError(
                f"The vector store {self._path} was made by another version of calpaca.",
                "Delete it to build it again, or use that version.",
            )
        self._connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")

    @property
    def embeddings(self) -> Embeddings:
        return self._embeddings

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        path: Path | None = None,
        **_: Any,
    ) -> FaissStore:
        """A store that holds `texts`."""
        store = cls(embedding, path)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def close(self) -> None:
        self._connection.close()

    # Changing ------------------------------------------------------------------------------------------------------
    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **_: Any,
    ) -> list[str]:
        """Add or replace texts, all or none. Ids that are missing are made up."""
        listed = list(texts)
        if not listed:
            return []
        names = [name or str(uuid.uuid4()) for name in (ids or [""] * len(listed))]
        described = metadatas or [{}] * len(listed)
        vectors = _unit_rows(np.asarray(self._embeddings.embed_documents(listed), np.float32))
        rows = list(zip(names, listed, described, vectors, strict=True))
        with self._transaction() as connection:
            for name, text, metadata, vector in rows:
                connection.execute(_DELETE, (name,))  # a new number: an inverted file may know the old one
                described_as = json.dumps(metadata, ensure_ascii=False, default=str)
                number = connection.execute(_INSERT, (name, text, described_as)).lastrowid
                connection.execute("INSERT INTO vectors VALUES (?, ?)", (number, vector.tobytes()))
        return names

    def delete(self, ids: list[str] | None = None, **_: Any) -> bool:
        """Delete documents, or all of them without ids."""
        with self._transaction() as connection:
            if ids is None:
                connection.execute("DELETE FROM documents")
            else:
                connection.executemany(_DELETE, [(name,) for name in ids])
        return True

    # Reading -------------------------------------------------------------------------------------------------------
    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids, in this order; unknown ids are left out."""
        found: list[Document] = []
        with self._transaction() as connection:
            for name in ids:
                row = connection.execute("SELECT id, text, metadata FROM documents WHERE id = ?", (name,)).fetchone()
                if row is not None:
                    found.append(Document(id=row[0], page_content=row[1], metadata=json.loads(row[2])))
        return found

    def similarity_search(self, query: str, k: int = 4, **_: Any) -> list[Document]:
        return [document for document, _score in self.similarity_search_with_score(query, k)]

    def similarity_search_with_score(self, query: str, k: int = 4, **_: Any) -> list[tuple[Document, float]]:
        """The k documents most like a question, with their cosine similarity, the best first."""
        return self.similarity_search_with_score_by_vector(self._embeddings.embed_query(query), k)

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **_: Any) -> list[Document]:
        return [document for document, _score in self.similarity_search_with_score_by_vector(embedding, k)]

    def similarity_search_with_score_by_vector(
        self, embedding: Sequence[float], k: int = 4
    ) -> list[tuple[Document, float]]:
        with self._lock:
            near = self._nearest(embedding, k)
            documents = self._documents(near)
        return [(documents[number], score) for number, score in near.items() if number in documents]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **_: Any
    ) -> list[Document]:
        return self.max_marginal_relevance_search_by_vector(
            self._embeddings.embed_query(query), k, fetch_k, lambda_mult
        )

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **_: Any
    ) -> list[Document]:
        """Of the `fetch_k` nearest documents the k that repeat each other least; `lambda_mult` 1 is plain similarity."""
        with self._lock:
            vectors = self._vectors(self._nearest(embedding, fetch_k))
            if not vectors:
                return []
            rows: list[Any] = list(vectors.values())
            chosen = maximal_marginal_relevance(np.asarray(embedding, np.float32), rows, lambda_mult=lambda_mult, k=k)
            numbers = [list(vectors)[position] for position in chosen]
            documents = self._documents(numbers)
        return [documents[number] for number in numbers if number in documents]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda similarity: min(1.0, max(0.0, (similarity + 1.0) / 2.0))  # float32 rounds past 1

    def __len__(self) -> int:
        with self._transaction() as connection:
            return int(connection.execute("SELECT count(*) FROM documents").fetchone()[0])

    def _documents(self, numbers: Iterable[int]) -> dict[int, Document]:
        found: dict[int, Document] = {}
        with self._transaction() as connection:
            for number in numbers:
                row = connection.execute(
                    "SELECT id, text, metadata FROM documents WHERE number = ?", (number,)
                ).fetchone()
                if row is not None:
                    found[number] = Document(id=row[0], page_content=row[1], metadata=json.loads(row[2]))
        return found

    def _vectors(self, numbers: Iterable[int]) -> dict[int, NDArray[np.float32]]:
        found: dict[int, NDArray[np.float32]] = {}
        with self._transaction() as connection:
            for number in numbers:
                row = connection.execute("SELECT vector FROM vectors WHERE number = ?", (number,)).fetchone()
                if row is not None:
                    found[number] = np.frombuffer(row[0], np.float32)
        return found

    # Nearness ------------------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Make the store ready to be searched, which takes a minute for a million vectors."""
        with self._lock:
            self._refresh()

    def _nearest(self, embedding: Sequence[float], k: int) -> dict[int, float]:
        """Similarities of the k nearest vectors by number, the best first. The lock is held."""
        self._refresh()
        query = _unit_rows(np.asarray([embedding], np.float32))[0]
        if k < 1:
            return {}
        found: dict[int, float] = {}
        if self._index is not None:
            self._check_length(query, self._index.d)
            scores, positions = self._index.search(query[None], min(k, self._index.ntotal))
            found = {int(self._numbers[p]): float(score) for p, score in zip(positions[0], scores[0], strict=True)}
        if self._file is not None:
            self._check_length(query, self._file.dimensions)
            vectors = self._vectors(self._file.nearest(query, max(_CHOICE, 4 * k)))
            found |= {number: float(vector @ query) for number, vector in vectors.items()}
            found = dict(sorted(found.items(), key=lambda item: -item[1])[:k])
        return found

    @staticmethod
    def _check_length(query: NDArray[np.float32], dimensions: int) -> None:
        if len(query) != dimensions:
            raise DocumentError(
                f"The index holds vectors of {dimensions} numbers, the question has {len(query)}.",
                "It was made with another embedding model: name that one with --embedding.",
            )

    def _refresh(self) -> None:
        """Read the vectors again when this or another process changed them."""
        with self._translated():
            (others,) = self._connection.execute("PRAGMA data_version").fetchone()
            version = (int(others), self._connection.total_changes)
            if version == self._version:
                return
            self._file = self._inverted_file(len(self))
            self._index = None
            blocks = list(self._blocks(after=self._file.last if self._file is not None else 0))
        if blocks:
            self._numbers = np.concatenate([numbers for numbers, _ in blocks])
            self._index = faiss.IndexFlatIP(blocks[0][1].shape[1])
            for _, vectors in blocks:
                self._index.add(vectors)
        self._version = version

    def _inverted_file(self, count: int) -> InvertedFile | None:
        """The file over most of `count` vectors; made here when it is missing or too far behind."""
        if self._path is None or count <= EXACT_UP_TO:
            return None
        path = newest(self._path.parent)
        if path is not None:
            same = self._file is not None and self._file.path == path
            found = self._file if self._file is not None and same else InvertedFile(path)
            (after,) = self._connection.execute(
                "SELECT count(*) FROM vectors WHERE number > ?", (found.last,)
            ).fetchone()
            gone = found.size - (count - after)
            if gone + after <= _MOST_BEHIND * found.size:
                return found
        return InvertedFile(write(self._path.parent, count, self._sample(count), self._blocks()))

    def _sample(self, count: int) -> NDArray[np.float32]:
        """Vectors spread evenly over the numbers, [sample_size, dimensions]."""
        step = max(1, count // sample_size(count))
        rows = self._connection.execute("SELECT vector FROM vectors WHERE number % ? = 0", (step,))
        return np.stack([np.frombuffer(row[0], np.float32) for row in rows])

    def _blocks(self, after: int = 0) -> Iterator[Block]:
        """Numbers and vectors past a number, in their order."""
        cursor = self._connection.execute(
            "SELECT number, vector FROM vectors WHERE number > ? ORDER BY number", (after,)
        )
        while rows := cursor.fetchmany(_BLOCK):
            vectors = np.frombuffer(b"".join(row[1] for row in rows), np.float32).reshape(len(rows), -1)
            yield np.array([row[0] for row in rows], np.int64), vectors

    # SQLite --------------------------------------------------------------------------------------------------------
    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated(), self._connection:
            yield self._connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DocumentError(
                f"The vector store {self._path or 'in memory'} cannot be used: {error}.",
                "Free disk space or check the permissions; CALPACA_CACHE moves it. A damaged one may be deleted.",
            ) from error


def _unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, d] with rows of length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = (vectors / np.where(lengths == 0.0, 1.0, lengths)).astype(np.float32)
    return unit
