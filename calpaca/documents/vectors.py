"""An embedder in the form that LangChain's vector stores take."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from calpaca.core.embedding import Embedder


class PreparedEmbeddings(Embeddings):
    """Gives out vectors that were computed before, and asks the embedder for the rest.

    Stores embed what is added to them. The index has the vectors already, from the ledger, and puts them into
    `prepared` while it adds, so that any store can be used and nothing is embedded twice. The question that was embedded
    last is remembered: a store and the index ask for the same one.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.prepared: Mapping[str, NDArray[np.float32]] = {}
        self._question: tuple[str, list[float]] | None = None

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        missing = [text for text in dict.fromkeys(texts) if text not in self.prepared]
        computed = dict(zip(missing, self.embedder.embed_documents(missing), strict=True)) if missing else {}
        return [(computed[text] if text in computed else self.prepared[text]).tolist() for text in texts]

    def embed_query(self, text: str) -> list[float]:
        last = self._question
        if last is None or last[0] != text:
            last = self._question = (text, self.embedder.embed_query(text).tolist())
        return last[1]
