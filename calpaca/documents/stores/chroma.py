"""Chroma in a folder, with what it needs to be used like the default store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from chromadb.config import Settings
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from calpaca.core.errors import DocumentError

_BATCH = 5000
"""Documents per call; Chroma takes 5,461 at most."""


def open_store(folder: Path, embeddings: Embeddings) -> ChromaStore:
    """The store in a folder, which is made where it is missing. Raises DocumentError."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return ChromaStore(embeddings, folder)
    except Exception as error:  # chromadb raises its Rust part's errors as plain exceptions
        raise DocumentError(
            f"The Chroma store in {folder} cannot be opened: {error}.", "Delete the folder to build it again."
        ) from error


class ChromaStore(Chroma):  # type: ignore[misc]  # untyped where the extra is not installed
    """Cosine similarity as the score, as in FaissStore; telemetry off; batches and metadata that Chroma accepts.

    Metadata values other than text, numbers and truth values are kept as their text; None and empty lists are left out.
    """

    def __init__(self, embeddings: Embeddings, folder: Path | None = None, collection: str = "calpaca") -> None:
        """Without a folder the store lives in memory."""
        super().__init__(
            collection_name=collection,
            embedding_function=embeddings,
            persist_directory=str(folder) if folder else None,
            client_settings=Settings(anonymized_telemetry=False, is_persistent=folder is not None),
            collection_configuration={"hnsw": {"space": "cosine"}},
        )

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add or replace texts. Ids that are missing are made up."""
        listed = list(texts)
        names: list[str] = []
        for part in _slices(len(listed)):
            cleaned = [_plain(metadata) for metadata in metadatas[part]] if metadatas else None
            names += super().add_texts(listed[part], cleaned, ids[part] if ids else None, **kwargs)
        return names

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> None:
        """Delete documents; ids that are not there are ignored, and so is an empty list."""
        if ids is None:
            super().delete(None, **kwargs)
            return
        for part in _slices(len(ids)):
            super().delete(ids[part], **kwargs)

    def similarity_search_with_score(self, *args: Any, **kwargs: Any) -> list[tuple[Document, float]]:
        """The k documents most like a question, with their cosine similarity, the best first."""
        found = super().similarity_search_with_score(*args, **kwargs)
        return [(document, 1.0 - distance) for document, distance in found]

    def _select_relevance_score_fn(self) -> Any:
        return lambda similarity: min(1.0, max(0.0, (similarity + 1.0) / 2.0))  # float32 rounds past 1


def _slices(length: int) -> Iterator[slice]:
    return (slice(start, start + _BATCH) for start in range(0, length, _BATCH))


def _plain(metadata: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    return {
        name: value if isinstance(value, str | int | float | bool) else str(value)
        for name, value in metadata.items()
        if value is not None and value != []
    }
