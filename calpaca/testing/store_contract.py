"""What every vector store must do, as a test class: subclass it, and override the fixture `opened`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

TEXTS = ("The llama is a camelid.", "The dome opens at nine.", "骆驼在沙漠里行走。", "Tickets cost four euros.")
_LENGTH = 64


class LetterEmbeddings(Embeddings):
    """Vectors of unit length that count letters: equal texts are nearest to each other."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        counts = np.bincount([ord(letter) % _LENGTH for letter in text] or [0], minlength=_LENGTH).astype(np.float64)
        unit: list[float] = (counts / np.linalg.norm(counts)).tolist()
        return unit


class StoreContract:
    """One contract for all vector stores, as the index uses them. `opened(folder, embeddings)` opens one."""

    @pytest.fixture
    def opened(self) -> Callable[[Path, Embeddings], VectorStore]:
        raise NotImplementedError("override the fixture `opened`")

    @pytest.fixture
    def store(self, opened: Callable[[Path, Embeddings], VectorStore], tmp_path: Path) -> VectorStore:
        store = opened(tmp_path / "index" / "store", LetterEmbeddings())
        store.add_documents(_documents(), ids=list("abcd"))
        return store

    def test_what_was_added_is_found_with_its_id_and_metadata(self, store: VectorStore) -> None:
        for name, text in zip("abcd", TEXTS, strict=True):
            (found,) = store.similarity_search(text, k=1)
            assert (found.page_content, found.id, found.metadata["source"]) == (text, name, f"{name}.txt")

    def test_scores_are_similarities_of_at_most_1_and_fall(self, store: VectorStore) -> None:
        scores = [score for _, score in store.similarity_search_with_score(TEXTS[0], k=4)]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] == pytest.approx(1.0, abs=1e-3)

    def test_documents_are_given_back_by_id(self, store: VectorStore) -> None:
        assert {found.page_content for found in store.get_by_ids(["a", "c", "none"])} == {TEXTS[0], TEXTS[2]}

    def test_the_same_id_replaces(self, store: VectorStore) -> None:
        store.add_documents([Document(page_content="Something else.", metadata={"source": "a.txt"})], ids=["a"])
        assert [found.page_content for found in store.get_by_ids(["a"])] == ["Something else."]
        assert len(store.similarity_search("Something else.", k=9)) == 4

    def test_what_is_deleted_is_gone_and_unknown_ids_are_ignored(self, store: VectorStore) -> None:
        store.delete(["a", "none"])
        assert store.get_by_ids(["a"]) == []
        assert {found.id for found in store.similarity_search(TEXTS[0], k=9)} == set("bcd")

    def test_spread_out_results_are_of_the_store(self, store: VectorStore) -> None:
        found = store.max_marginal_relevance_search(TEXTS[0], k=2, fetch_k=4)
        assert len({each.page_content for each in found}) == 2

    def test_it_is_there_again_when_it_is_opened_again(
        self, store: VectorStore, opened: Callable[[Path, Embeddings], VectorStore], tmp_path: Path
    ) -> None:
        _close(store)
        again = opened(tmp_path / "index" / "store", LetterEmbeddings())
        assert [found.id for found in again.similarity_search(TEXTS[2], k=1)] == ["c"]
        _close(again)

    def test_an_empty_one_finds_nothing(
        self, opened: Callable[[Path, Embeddings], VectorStore], tmp_path: Path
    ) -> None:
        empty = opened(tmp_path / "empty", LetterEmbeddings())
        assert empty.similarity_search("anything", k=3) == []
        _close(empty)


def _documents() -> list[Document]:
    return [
        Document(page_content=text, metadata={"source": f"{name}.txt", "page": number})
        for number, (name, text) in enumerate(zip("abcd", TEXTS, strict=True))
    ]


def _close(store: Any) -> None:
    """Close a store that can be closed, or its client."""
    close = getattr(store, "close", None) or getattr(getattr(store, "client", None), "close", None)
    if close is not None:
        close()
