"""Stores with more vectors than are compared one by one."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings

from calpaca.core.errors import DocumentError
from calpaca.documents.stores import faiss
from calpaca.documents.stores.faiss import FaissStore


class Numbered(Embeddings):
    """Text `n` lies where a generator with the seed n puts it, beside one of ten centres."""

    centres = np.random.default_rng(0).standard_normal((10, 32))

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text):
        number = int(text)
        return (self.centres[number % 10] + np.random.default_rng(number).standard_normal(32) * 0.4).tolist()


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaissStore:
    monkeypatch.setattr(faiss, "EXACT_UP_TO", 500)
    store = FaissStore(Numbered(), tmp_path / "vectors.sqlite")
    names = [str(number) for number in range(1500)]
    store.add_texts(names, ids=names)
    return store


def found(store: FaissStore, question: str, k: int = 10) -> list[str]:
    return [document.id for document in store.similarity_search(question, k)]


def files(store: FaissStore) -> list[str]:
    return sorted(path.name for path in store._path.parent.glob("*.ivf"))


def test_nearly_all_of_the_nearest_are_found_with_their_exact_scores(many, monkeypatch) -> None:
    asked = [str(number) for number in range(2000, 2050)]
    chosen = [many.similarity_search_with_score(question, 10) for question in asked]
    assert files(many) == ["vectors-1500.ivf"]
    monkeypatch.setattr(faiss, "EXACT_UP_TO", 5000)
    exact_store = FaissStore(Numbered(), many._path)
    exact = [exact_store.similarity_search_with_score(question, 10) for question in asked]
    pairs = list(zip(chosen, exact, strict=True))
    shared = [len({d.id for d, _ in ours} & {d.id for d, _ in theirs}) for ours, theirs in pairs]
    assert np.mean(shared) >= 9.5
    assert [ours[0][1] for ours, _ in pairs] == pytest.approx([theirs[0][1] for _, theirs in pairs], abs=1e-5)


def test_what_was_added_replaced_and_deleted_since_is_known(many) -> None:
    assert found(many, "7")[0] == "7"
    before = files(many)
    many.add_texts(["1501"], ids=["new"])
    many.add_texts(["1502"], ids=["7"])
    many.delete(["8"])
    assert found(many, "1501")[0] == "new"
    assert found(many, "1502")[0] == "7"
    assert many.similarity_search_with_score("7", 1)[0][0].id != "7"
    assert "8" not in found(many, "8")
    assert files(many) == before


def test_a_file_that_is_far_behind_is_made_anew(many) -> None:
    found(many, "1")
    more = [str(number) for number in range(3000, 3400)]
    many.add_texts(more, ids=more)
    assert found(many, "3210")[0] == "3210"
    assert files(many) == ["vectors-1900.ivf"]
    many.delete([str(number) for number in range(900)])
    assert len(found(many, "3210", 50)) == 50
    assert found(many, "3210")[0] == "3210"


def test_another_process_sees_what_changed(many) -> None:
    other = FaissStore(Numbered(), many._path)
    assert found(other, "9")[0] == "9"
    many.delete(["9"])
    assert "9" not in found(other, "9")


def test_diverse_documents_come_from_the_file_too(many) -> None:
    assert len(many.max_marginal_relevance_search("3", k=5)) == 5


def test_a_damaged_file_is_named(many) -> None:
    found(many, "1")
    damaged = many._path.with_name("damaged")
    damaged.write_bytes(b"IwSq no index")
    damaged.replace(many._path.with_name("vectors-1500.ivf"))  # a file that is mapped must not be cut short
    with pytest.raises(DocumentError, match=r"vectors-1500\.ivf cannot be read"):
        found(FaissStore(Numbered(), many._path), "1")


def test_a_store_of_another_version_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "vectors.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE documents (id TEXT PRIMARY KEY, text TEXT, metadata TEXT, vector BLOB)")
        connection.execute("INSERT INTO documents VALUES ('1', 'kept', '{}', x'00')")
    with pytest.raises(DocumentError, match="made by another version"):
        FaissStore(Numbered(), path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT text FROM documents").fetchall() == [("kept",)]
