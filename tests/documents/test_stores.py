from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

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
