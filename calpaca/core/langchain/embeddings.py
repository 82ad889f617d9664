"""CalpacaEmbeddings: a local embedding model as LangChain's embeddings."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Self

from langchain_core.embeddings import Embeddings
from pydantic import AliasChoices, ConfigDict, Field, model_validator

from calpaca.core.embedding import Embedder
from calpaca.core.langchain.serializable import PublicSerializable


class CalpacaEmbeddings(PublicSerializable, Embeddings):
    """Embeds texts with a local model: unit vectors, with the model's own prompts for queries and passages.

        CalpacaEmbeddings().embed_query("What is a llama?")

    The name is checked at once, the model is loaded at the first call.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = Field(
        None,
        validation_alias=AliasChoices("model", "model_name"),
        description="Catalogue name, hub id or sentence-transformers folder; left out: the settings' or the catalogue's.",
    )
    runtime: Any = Field(
        None, exclude=True, repr=False, description="Where models are loaded; the process's own if left out."
    )

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        """Raises ModelNotFoundError that names the nearest known name."""
        if self.model is not None:
            self._runtime().check_embedding(self.model)
        return self

    def _runtime(self) -> Any:
        # By name, since the core does not import what lies above it.
        return self.runtime if self.runtime is not None else import_module("calpaca").runtime()

    @property
    def embedder(self) -> Embedder:
        """The model, loaded when first asked for. Raises ModelError."""
        embedder: Embedder = self._runtime().embedder(self.model)
        return embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text."""
        vectors: list[list[float]] = self.embedder.embed_documents(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        vector: list[float] = self.embedder.embed_query(text).tolist()
        return vector
