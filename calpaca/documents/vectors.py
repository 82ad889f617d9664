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
    `prepared` while it adds, so that any store can be used and nothing is embedded twice.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.prepared: Mapping[str, NDArray[np.float32]] = {}

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        missing = [text for text in dict.fromkeys(texts) if text not in self.prepared]
        computed = dict(zip(missing, self.embedder.embed_documents(missing), strict=True)) if missing else {}
        return [(computed[text] if text in computed else self.prepared[text]).tolist() for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector: list[float] = self.embedder.embed_query(text).tolist()
        return vector
