"""Search in an index by meaning and by words."""

from __future__ import annotations

from typing import Any

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from numpy.typing import NDArray

from calpaca.documents import fusion
from calpaca.documents.manifest import Manifest
from calpaca.documents.search import Search

CANDIDATES = 50
"""Chunks that each way of searching puts forward."""


class HybridRetriever(BaseRetriever):
    """The chunks of an index, ranked as `search` says.

    A chunk's similarity is the cosine of its vector with the question's; where the index has the vectors of its
    sentences, the mean of that and the best sentence's cosine. The store puts forward the most similar chunks, the
    manifest those that share most words; where a filter is set, the manifest puts forward both, exactly.
    """

    store: VectorStore
    manifest: Manifest
    search: Search = Search(kind="hybrid")

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:  # noqa: ARG002  # LangChain names it
        return [document for document, _ in self.ranked(query, self.search)]

    def ranked(self, question: str, search: Search) -> list[tuple[Document, float]]:
        """The best `search.k` documents with their cosine similarity, which need not be what they are ordered by."""
        if self.store.embeddings is None:
            return []
        query = np.asarray(self.store.embeddings.embed_query(question), np.float32)
        near = {} if search.kind == "keywords" else self._near(question, query, search)
        words = {} if search.kind in ("similarity", "mmr") else self._shares(question, search)
        candidates = _Candidates(query, near, words, self.manifest.vectors([*near, *words]))
        names = candidates.order(search)[: search.k]
        documents = {document.id: document for document in self.store.get_by_ids(names)}
        return [(documents[name], candidates.cosines[name]) for name in names if name in documents]

    def _near(self, question: str, query: NDArray[np.float32], search: Search) -> dict[str, float]:
        """Cosines of the most similar chunks by id, the best first."""
        k = max(search.k, search.fetch_k if search.kind == "mmr" else CANDIDATES)
        if search.where:
            return self.manifest.nearest(query, k, search.where)
        found = self.store.similarity_search_with_score(question, k=k)
        return {document.id: float(score) for document, score in found if document.id}

    def _shares(self, question: str, search: Search) -> dict[str, float]:
        return self.manifest.search(question, max(search.k, CANDIDATES), search.where)


class _Candidates:
    """Chunks by id that were put forward: `near` with their cosine, `words` with their share of the question's words."""

    def __init__(
        self,
        query: NDArray[np.float32],
        near: dict[str, float],
        words: dict[str, float],
        vectors: dict[str, NDArray[np.float32]],
    ) -> None:
        self.near = near
        self.words = words
        self.vectors = vectors
        self.query = query / max(float(np.linalg.norm(query)), 1e-12)
        own = {name: float(rows[0] @ self.query) for name, rows in vectors.items()}
        self.cosines = own | near  # the store's are not rounded

    def order(self, search: Search) -> list[str]:
        if search.kind == "similarity":
            return list(self.near)
        if search.kind == "keywords":
            return [name for name in self.words if name in self.cosines]
        if search.kind == "rrf":
            return fusion.by_ranks([list(self.near), [name for name in self.words if name in self.cosines]])
        if search.kind == "mmr":
            return self._diverse(search)
        return self._fused()

    def _fused(self) -> list[str]:
        names = list(self.cosines)
        if not names:
            return []
        similarities = np.array([self._similarity(name) for name in names], np.float32)
        shares = np.array([self.words.get(name, 0.0) for name in names], np.float32)
        scores = fusion.by_scores(similarities, shares, nearest=CANDIDATES)
        return [names[position] for position in np.argsort(-scores, kind="stable")]

    def _similarity(self, name: str) -> float:
        """The mean of a chunk's cosine and its best sentence's."""
        sentences = self.vectors[name][1:] if name in self.vectors else ()
        cosine = self.cosines[name]
        return (cosine + float((sentences @ self.query).max())) / 2 if len(sentences) else cosine

    def _diverse(self, search: Search) -> list[str]:
        names = [name for name in self.near if name in self.vectors]
        rows: list[Any] = [self.vectors[name][0] for name in names]
        if not names:
            return []
        chosen = maximal_marginal_relevance(self.query, rows, lambda_mult=search.lambda_mult, k=search.k)
        return [names[position] for position in chosen]
