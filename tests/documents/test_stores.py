from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from calpaca.core.errors import DocumentError
from calpaca.documents.stores.faiss import FaissStore, open_store


class TestFaissStoreOnDisk(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        store = open_store(tmp_path, self.get_embeddings())
        yield store
        store.close()


class TestFaissStoreInMemory(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self) -> Iterator[VectorStore]:
        store = FaissStore(self.get_embeddings())
        yield store
        store.close()


class TestChromaStoreOnDisk(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> VectorStore:
        chroma = pytest.importorskip("calpaca.documents.stores.chroma", reason="needs calpaca[chroma]")
        return chroma.open_store(tmp_path, self.get_embeddings())


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")
class TestQdrantStoreInAFolder(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Iterator[VectorStore]:
        qdrant = pytest.importorskip("calpaca.documents.stores.qdrant", reason="needs calpaca[qdrant]")
        store = qdrant.open_store(tmp_path / "index" / "qdrant", self.get_embeddings())
        yield store
        store.client.close()


def test_another_process_sees_what_was_added(tmp_path: Path) -> None:
    embeddings = VectorStoreIntegrationTests.get_embeddings()
    first, second = open_store(tmp_path, embeddings), open_store(tmp_path, embeddings)
    first.add_texts(["foo"], ids=["1"])
    assert [found.page_content for found in second.similarity_search("foo", k=2)] == ["foo"]
    second.add_texts(["bar"], ids=["2"])
    assert len(first.similarity_search("foo", k=2)) == len(first) == 2
    first.delete()
    assert second.similarity_search("foo") == []
    first.close()
    second.close()


def test_scores_are_cosine_similarities_in_both_stores(tmp_path: Path) -> None:
    chroma = pytest.importorskip("calpaca.documents.stores.chroma", reason="needs calpaca[chroma]")
    embeddings = VectorStoreIntegrationTests.get_embeddings()
    stores = [FaissStore(embeddings), chroma.open_store(tmp_path, embeddings)]
    for store in stores:
        store.add_texts(["foo", "bar", "baz"], ids=["1", "2", "3"])
    ours, theirs = ([(d.id, s) for d, s in store.similarity_search_with_score("foo", k=3)] for store in stores)
    assert ours[0] == ("1", pytest.approx(1.0, abs=1e-5))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-4)
    assert stores[0].similarity_search_with_relevance_scores("foo", k=1)[0][1] == pytest.approx(1.0, abs=1e-5)


def test_chroma_takes_any_metadata_and_more_texts_than_one_call_holds(tmp_path: Path) -> None:
    chroma = pytest.importorskip("calpaca.documents.stores.chroma", reason="needs calpaca[chroma]")
    store = chroma.open_store(tmp_path, VectorStoreIntegrationTests.get_embeddings())
    metadata = {"path": Path("a.txt"), "nothing": None, "empty": [], "many": [1, 2], "page": 3}
    store.add_texts([f"text {i}" for i in range(6000)], [metadata] * 6000, ids=[str(i) for i in range(6000)])
    assert store.get_by_ids(["5999"])[0].metadata == {"path": "a.txt", "many": "[1, 2]", "page": 3}
    store.delete([])
    store.delete([str(i) for i in range(6000)])
    assert store.similarity_search("text 1") == []


def test_a_qdrant_server_that_is_gone_is_a_clear_error(tmp_path, monkeypatch) -> None:
    qdrant = pytest.importorskip("calpaca.documents.stores.qdrant", reason="needs calpaca[qdrant]")
    monkeypatch.setenv("CALPACA_QDRANT_URL", "http://127.0.0.1:9")
    with pytest.raises(DocumentError, match=r"at http://127\.0\.0\.1:9 cannot be opened") as caught:
        qdrant.open_store(tmp_path / "index" / "qdrant", VectorStoreIntegrationTests.get_embeddings())
    assert "CALPACA_QDRANT_URL" in caught.value.hint


def test_a_file_that_is_no_store_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "vectors.sqlite").write_bytes(b"this is not a database at all" * 50)
    with pytest.raises(DocumentError, match="cannot be used"):
        open_store(tmp_path, VectorStoreIntegrationTests.get_embeddings())


def test_a_question_of_another_length_is_a_clear_error() -> None:
    store = FaissStore(VectorStoreIntegrationTests.get_embeddings())
    store.add_texts(["foo"])
    with pytest.raises(DocumentError, match="vectors of 6 numbers, the question has 3"):
        store.similarity_search_by_vector([1.0, 2.0, 3.0])
    store.close()
