"""What `calpaca run retrieval_qa` and `calpaca run retrieval_index` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from calpaca.core.context import ContextPolicy
from calpaca.core.errors import UsageError
from calpaca.core.runtime import Runtime
from calpaca.documents.index import DocumentIndex
from calpaca.documents.loaders import find_files
from calpaca.documents.retrieval import Search
from calpaca.documents.splitter import CHUNK_OVERLAP, CHUNK_SIZE
from calpaca.plugins.options import Flag, ModelOptions, SamplingOptions

Strategy = Literal["stuff", "refine", "map_rerank", "auto"]
CiteMode = Literal["strict", "loose", "off"]


class IndexOptions(BaseModel):
    """Which documents, and how they are cut and kept."""

    files: Annotated[list[Path], Flag("file")] = Field(
        [],
        description="Document, or a folder of them: text, Markdown, HTML, PDF, EPUB, Office, tables, JSON, code; repeat for several.",
    )
    chunk_size: int = Field(CHUNK_SIZE, description="Longest chunk, in tokens of the embedding model.")
    chunk_overlap: int = Field(
        CHUNK_OVERLAP, description="Tokens that a chunk repeats from the one before it, in whole sentences."
    )
    store: str = Field("faiss", description="Vector store: faiss or chroma.")

    def index(self, runtime: Runtime, embedding: str | None) -> DocumentIndex:
        """The index of these documents, as it lies on disk. Raises UsageError without documents."""
        if not self.files:
            raise UsageError("No document is named.", "Name a file or folder with --file.")
        find_files(self.files, runtime.loaders)  # a missing one is said before a model is loaded
        return DocumentIndex(
            self.files,
            runtime.embedder(embedding),
            runtime.loaders,
            runtime.stores.get(self.store),
            chunk_size=self.chunk_size,
            chunk_overlap=self.chunk_overlap,
        )

    def job_parameters(self, embedding: str | None) -> dict[str, Any]:
        """These options as the ledger keeps them: from any folder they start the same job again."""
        named = {"embedding": embedding} if embedding else {}
        chosen = self.model_dump(mode="json", include=set(IndexOptions.model_fields) - {"files"})
        return {"files": [str(path.expanduser().resolve()) for path in self.files], **chosen, **named}


class RetrievalIndexOptions(IndexOptions, ModelOptions):
    """Options of the job that builds an index. Of the model options it uses `--embedding` alone."""


class RetrievalQAOptions(IndexOptions, ModelOptions, SamplingOptions):
    """Options of the question answerer."""

    question: str | None = Field(None, description="What to ask; without it questions are read line by line.")
    strategy: Strategy = Field(
        "stuff",
        description="stuff: one prompt with all passages; refine: an answer improved passage by passage; map_rerank: the "
        "best of an answer from each; auto: stuff if it fits, else map_rerank.",
    )
    cite: CiteMode = Field(
        "loose",
        description="Citations, each checked against the documents. strict leaves out sentences that have none; loose "
        "shows them; off cites nothing.",
    )
    context_policy: ContextPolicy = Field(
        "drop",
        description="Passages without room in the context: drop (named), summarise, refine (asked about in turn) or error.",
    )
    session: str | None = Field(None, description="Name of a conversation to begin or go on with.")
    rewrite: bool = Field(True, description="Have follow-up questions rewritten so that they stand alone.")
    k: int = Field(4, description="Chunks that are looked up.")
    search: Literal["similarity", "hybrid", "mmr"] = Field(
        "similarity",
        description="similarity of meaning; hybrid: of words too (BM25); mmr (maximal marginal relevance): passages "
        "that differ.",
    )
    fetch_k: int = Field(20, description="Chunks that mmr chooses from.")
    mmr_lambda: float = Field(0.5, description="mmr: 1 is plain similarity, 0 the most different passages.")
    prompt_file: Path | None = Field(None, description="TOML file with prompts of your own.")

    def chosen_search(self) -> Search:
        """Raises UsageError for a number out of range."""
        kind: Literal["similarity", "mmr"] = "mmr" if self.search == "mmr" else "similarity"
        return Search(self.k, kind, self.fetch_k, self.mmr_lambda)
