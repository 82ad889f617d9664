"""Options that name an index: which documents, and how they are cut and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from calpaca.core.errors import UsageError
from calpaca.core.runtime import Runtime
from calpaca.documents.index import DocumentIndex
from calpaca.documents.loaders import find_files
from calpaca.documents.shelf import paths_of_collection
from calpaca.documents.splitter import CHUNK_OVERLAP, CHUNK_SIZE
from calpaca.plugins.options import Flag


class IndexOptions(BaseModel):
    """Which documents, and how they are cut and kept."""

    files: Annotated[list[Path], Flag("file")] = Field(
        [],
        description="Document, or a folder of them: text, Markdown, HTML, PDF, EPUB, Office, tables, JSON, code; repeat for several.",
    )
    collection: str = Field(
        "",
        description="Name of an index; once made with --file, the name alone is enough, and --file changes its documents.",
    )
    chunk_size: int = Field(CHUNK_SIZE, description="Longest chunk, in tokens of the embedding model.")
    chunk_overlap: int = Field(
        CHUNK_OVERLAP, description="Tokens that a chunk repeats from the one before it, in whole sentences."
    )
    sentences: bool = Field(
        True, description="Embed each sentence of a chunk too: finds more, and indexing takes about twice as long."
    )
    store: str = Field("faiss", description="Vector store: faiss, chroma or qdrant.")

    def index(self, runtime: Runtime, embedding: str | None) -> DocumentIndex:
        """The index of these documents, as it lies on disk.

        Raises UsageError without documents, DocumentError for a missing one and for an unknown collection.
        """
        files = self.documents()
        find_files(files, runtime.loaders)  # a missing one is said before a model is loaded
        return DocumentIndex(
            files,
            runtime.embedder(embedding),
            runtime.loaders,
            runtime.stores.get(self.store),
            chunk_size=self.chunk_size,
            chunk_overlap=self.chunk_overlap,
            sentences=self.sentences,
            collection=self.collection,
        )

    def documents(self) -> list[Path]:
        """The files and folders that are named, or those that the collection has."""
        if self.files:
            return self.files
        if self.collection:
            return paths_of_collection(self.collection)
        raise UsageError("No document is named.", "Name a file or folder with --file, or a collection.")

    def job_parameters(self, embedding: str | None) -> dict[str, Any]:
        """These options as the ledger keeps them: from any folder they start the same job again."""
        named = {"embedding": embedding} if embedding else {}
        chosen = self.model_dump(mode="json", include=set(IndexOptions.model_fields) - {"files"})
        return {"files": [str(path.expanduser().resolve()) for path in self.files], **chosen, **named}
