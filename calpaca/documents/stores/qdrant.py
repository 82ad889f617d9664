"""Qdrant, in a folder or on a server, with what it needs to be used like the default store."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse
from qdrant_client.models import Distance, VectorParams

from calpaca.core.errors import DocumentError

URL = "CALPACA_QDRANT_URL"
KEY = "CALPACA_QDRANT_KEY"
_NAME = "calpaca_id"
_NAMESPACE = uuid.UUID("5f3c1f4e-7a0f-4c59-9c0e-6a1f0d6f6f0a")
_BATCH = 256


def open_store(folder: Path, embeddings: Embeddings) -> QdrantStore:
    """The collection named like the index: on the server at `CALPACA_QDRANT_URL`, else in the folder, which is made
    where it is missing. The embedded one belongs to one process at a time and compares vectors one by one.

    Raises DocumentError when the server does not answer or the folder cannot be opened.
    """
    url = os.environ.get(URL)
    with _translated(f"at {url}" if url else f"in {folder}", "opened"):
        client = (
            QdrantClient(url=url, api_key=os.environ.get(KEY), check_compatibility=False)
            if url
            else QdrantClient(path=str(folder))
        )
        return QdrantStore(embeddings, client, f"calpaca-{folder.parent.name}")


@contextmanager
def _translated(where: str, what: str = "used") -> Iterator[None]:
    try:
        yield
    except (ApiException, OSError, RuntimeError, ValueError) as error:
        told = f"{error.status_code} {error.reason_phrase}" if isinstance(error, UnexpectedResponse) else error
        raise DocumentError(
            f"The Qdrant store {where} cannot be {what}: {told}.",
            f"Check the server, {URL} and {KEY}."
            if os.environ.get(URL)
            else f"Close the process that has it open, or name a server with {URL}.",
        ) from error


class QdrantStore(QdrantVectorStore):  # type: ignore[misc]  # untyped where the extra is not installed
    """Cosine similarity as the score, as in FaissStore. Any text is an id: Qdrant's own is made from it."""

    def __init__(self, embeddings: Embeddings, client: QdrantClient, collection: str = "calpaca") -> None:
        if not client.collection_exists(collection):
            size = len(embeddings.embed_query("size"))
            client.create_collection(collection, VectorParams(size=size, distance=Distance.COSINE))
        super().__init__(client, collection, embeddings, validate_collection_config=False)

    def add_texts(  # type: ignore[override]
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        ids: Sequence[str] | None = None,
        **_: Any,
    ) -> list[str]:
        """Add or replace texts. Ids that are missing are made up."""
        listed = list(texts)
        names = [name or str(uuid.uuid4()) for name in (ids or [""] * len(listed))]
        described = [
            {**metadata, _NAME: name} for metadata, name in zip(metadatas or [{}] * len(listed), names, strict=True)
        ]
        with self._at_work():
            super().add_texts(listed, described, [_point(name) for name in names], batch_size=_BATCH)
        return names

    def delete(self, ids: list[str] | None = None, **_: Any) -> bool | None:
        """Delete documents; ids that are not there are ignored."""
        with self._at_work():
            return super().delete([_point(name) for name in ids or []]) if ids else True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids, in this order; unknown ids are left out."""
        with self._at_work():
            found = {document.id: document for document in super().get_by_ids([_point(name) for name in ids])}
        return [found[name] for name in ids if name in found]

    def similarity_search_with_score(self, *arguments: Any, **named: Any) -> list[tuple[Document, float]]:
        with self._at_work():
            return list(super().similarity_search_with_score(*arguments, **named))

    def _at_work(self) -> AbstractContextManager[None]:
        """Translates what the client raises, as when a server goes away."""
        return _translated(f"'{self.collection_name}'")

    @classmethod
    def _document_from_point(cls, *arguments: Any, **named: Any) -> Document:
        document = super()._document_from_point(*arguments, **named)
        metadata = {
            name: value for name, value in document.metadata.items() if name not in (_NAME, "_id", "_collection_name")
        }
        return Document(id=document.metadata.get(_NAME), page_content=document.page_content, metadata=metadata)


def _point(name: str) -> str:
    """Qdrant takes numbers and UUIDs only."""
    return str(uuid.uuid5(_NAMESPACE, name))
