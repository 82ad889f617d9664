"""Search by meaning and by words, in one ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore

RANK_CONSTANT = 60
"""Reciprocal rank fusion's k, as its authors found it best."""


N = TypeVar("N", str, int)


def fuse(rankings: Sequence[Sequence[N]], constant: int = RANK_CONSTANT) -> list[N]:
    """One ranking out of several: the sum of 1 / (constant + rank), ranks from 1.

    Reciprocal rank fusion, Cormack, Clarke and Büttcher, SIGIR 2009. Equal sums stand as they came.
    """
    sums: dict[N, float] = {}
    for ranking in rankings:
        for rank, name in enumerate(ranking, 1):
            sums[name] = sums.get(name, 0.0) + 1.0 / (constant + rank)
    return sorted(sums, key=lambda name: -sums[name])


class HybridRetriever(BaseRetriever):
    """The chunks of a store, ranked by cosine similarity and by `keywords` (question and count to ids) together.

    Of each ranking the first `fetch_k` count; `k` documents are given out.
    """

    store: VectorStore
    keywords: Callable[[str, int], list[str]]
    k: int = 4
    fetch_k: int = 50

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:  # noqa: ARG002  # LangChain names it
        return [document for document, _ in self.ranked(query, self.k)]

    def ranked(self, question: str, k: int) -> list[tuple[Document, float]]:
        """The best `k` documents with their cosine similarity, which is not what they are ordered by."""
        near = self.store.similarity_search_with_score(question, k=max(self.fetch_k, k))
        known = {document.id: (document, float(score)) for document, score in near if document.id}
        order = fuse([list(known), self.keywords(question, max(self.fetch_k, k))])[:k]
        missing = [name for name in order if name not in known]
        scored = known | self._scored(question, missing)
        return [scored[name] for name in order if name in scored]

    def _scored(self, question: str, names: Sequence[str]) -> dict[str, tuple[Document, float]]:
        """Documents that only their words brought up. No store gives out vectors, so these few are embedded again."""
        documents = self.store.get_by_ids(names) if names else []
        embeddings = self.store.embeddings
        if not documents or embeddings is None:
            return {}
        vectors = np.asarray(embeddings.embed_documents([each.page_content for each in documents]), np.float32)
        query = np.asarray(embeddings.embed_query(question), np.float32)
        cosines = vectors @ query / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)).clip(1e-12)
        return {str(each.id): (each, float(cosine)) for each, cosine in zip(documents, cosines, strict=True)}
