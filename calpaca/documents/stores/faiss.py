"""A vector store on disk: documents and vectors in one SQLite file, searched with FAISS.

SQLite holds everything and every change is one transaction, so a crash leaves the state before it or after it. The
FAISS index is made from the vectors when the store is first searched and again after a change, also one by another
process; it is never written, and nothing is pickled.
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

FILE = "vectors.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    id TEXT PRIMARY KEY, text TEXT NOT NULL, metadata TEXT NOT NULL, vector BLOB NOT NULL
)
"""
_UPSERT = """
INSERT INTO documents VALUES (?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET text = excluded.text, metadata = excluded.metadata, vector = excluded.vector
"""


def open_store(folder: Path, embeddings: Embeddings) -> FaissStore:
    """The store in a folder, which is made where it is missing. Raises DocumentError."""
    folder.mkdir(parents=True, exist_ok=True)
    return FaissStore(embeddings, folder / FILE)


class FaissStore(VectorStore):
    """Exact search by cosine similarity, which is the score everywhere: 1.0 is the same direction.

    Adding an id that is there replaces its document; deleting one that is not does nothing. Metadata is kept as JSON:
    a value that JSON does not know is kept as its text. Safe to use from several threads and processes.
    """

    def __init__(self, embeddings: Embeddings, path: Path | None = None) -> None:
        """Without a path the store lives in memory. Raises DocumentError when the file is no store."""
        self._embeddings = embeddings
        self._path = path
        self._lock = threading.RLock()
        self._ids: list[str] = []
        self._vectors: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._index: Any = None
        self._version: tuple[int, int] | None = None
        with self._translated():
            self._connection = sqlite3.connect(path or ":memory:", timeout=30, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(_SCHEMA)

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
        rows = [
            (name, text, json.dumps(metadata, ensure_ascii=False, default=str), vector.tobytes())
            for name, text, metadata, vector in zip(names, listed, described, vectors, strict=True)
        ]
        with self._transaction() as connection:
            connection.executemany(_UPSERT, rows)
        return names

    def delete(self, ids: list[str] | None = None, **_: Any) -> bool:
        """Delete documents, or all of them without ids."""
        with self._transaction() as connection:
            if ids is None:
                connection.execute("DELETE FROM documents")
            else:
                connection.executemany("DELETE FROM documents WHERE id = ?", [(name,) for name in ids])
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
            positions, scores = self._nearest(embedding, k)
            documents = {document.id: document for document in self.get_by_ids([self._ids[i] for i in positions])}
            names = [self._ids[position] for position in positions]
        return [(documents[name], score) for name, score in zip(names, scores, strict=True) if name in documents]

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
            positions, _scores = self._nearest(embedding, fetch_k)
            if not positions:
                return []
            chosen = maximal_marginal_relevance(
                np.asarray(embedding, np.float32), list(self._vectors[positions]), lambda_mult=lambda_mult, k=k
            )
            return self.get_by_ids([self._ids[positions[number]] for number in chosen])

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda similarity: min(1.0, max(0.0, (similarity + 1.0) / 2.0))  # float32 rounds past 1

    def __len__(self) -> int:
        with self._transaction() as connection:
            return int(connection.execute("SELECT count(*) FROM documents").fetchone()[0])

    # The FAISS index -----------------------------------------------------------------------------------------------
    def _nearest(self, embedding: Sequence[float], k: int) -> tuple[list[int], list[float]]:
        """Positions and similarities of the k nearest vectors, the best first. The lock is held."""
        self._refresh()
        if self._index is None or k < 1:
            return [], []
        query = _unit_rows(np.asarray([embedding], np.float32))
        if query.shape[1] != self._vectors.shape[1]:
            raise DocumentError(
                f"The index holds vectors of {self._vectors.shape[1]} numbers, the question has {query.shape[1]}.",
                "It was made with another embedding model: name that one with --embedding.",
            )
        scores, positions = self._index.search(query, min(k, len(self._ids)))
        return [int(position) for position in positions[0]], [float(score) for score in scores[0]]

    def _refresh(self) -> None:
        """Read the vectors again when this or another process changed them."""
        with self._translated():
            (others,) = self._connection.execute("PRAGMA data_version").fetchone()
            version = (int(others), self._connection.total_changes)
            if version == self._version:
                return
            rows = self._connection.execute("SELECT id, vector FROM documents ORDER BY rowid").fetchall()
        self._ids = [row[0] for row in rows]
        self._index = None
        if rows:
            self._vectors = np.frombuffer(b"".join(row[1] for row in rows), np.float32).reshape(len(rows), -1)
            self._index = faiss.IndexFlatIP(self._vectors.shape[1])
            self._index.add(self._vectors)
        self._version = version

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
