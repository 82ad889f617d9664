import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore

from calpaca.core.errors import UsageError
from calpaca.documents.retrieval import Search, retrieve
from calpaca.documents.splitter import SentenceSplitter
from calpaca.documents.stores.faiss import FaissStore
from calpaca.documents.vectors import PreparedEmbeddings
from calpaca.testing import FakeEmbedder

TEXT = "Ants dig. Bees hum.\n\nCats sleep all day long.\nDogs bark at the night. Eels swim home."


class Fixed(BaseRetriever):
    """Gives out the same documents for every question."""

    found: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.found


@pytest.fixture
def embeddings() -> PreparedEmbeddings:
    return PreparedEmbeddings(FakeEmbedder(256))


def chunk(text: str, start: int, line: int, index: int, source: str = "a.txt") -> Document:
    place = {"start": start, "end": start + len(text), "start_line": line, "end_line": line + text.count("\n")}
    return Document(text, metadata={"source": source, "index": index, **place})


def found(*chunks: Document) -> list[tuple]:
    passages = retrieve(Fixed(found=list(chunks)), "?", Search(k=10))
    return [(passage.text, passage.start, passage.end) for passage in passages]


def test_overlapping_chunks_become_one_passage() -> None:
    first, second = TEXT[0:19], TEXT[10:45]
    assert found(chunk(second, 10, 1, 1), chunk(first, 0, 1, 0)) == [(TEXT[0:45], 1, 3)]


def test_chunks_that_follow_each_other_are_joined_as_they_stand_in_the_file() -> None:
    assert found(chunk("Ants dig.", 0, 1, 0), chunk("Bees hum.", 10, 1, 1)) == [("Ants dig. Bees hum.", 1, 1)]
    assert found(chunk("Bees hum.", 10, 1, 1), chunk(TEXT[21:45], 21, 3, 2)) == [(TEXT[10:45], 1, 3)]


def test_a_joined_passage_stands_where_its_best_part_stood() -> None:
    far = chunk("Eels swim home.", 70, 4, 4)
    assert [text for text, *_ in found(chunk("Bees hum.", 10, 1, 1), far, chunk("Ants dig.", 0, 1, 0))] == [
        "Ants dig. Bees hum.", "Eels swim home.",
    ]  # fmt: skip


def test_chunks_of_other_files_and_of_other_splitters_stay_apart() -> None:
    other = chunk("Bees hum.", 10, 1, 1, source="b.txt")
    assert len(found(chunk("Ants dig.", 0, 1, 0), other)) == 2
    assert found(Document("Ants dig."), Document("Bees hum.")) == [("Ants dig.", None, None), ("Bees hum.", None, None)]


def test_without_merging_every_chunk_is_a_passage() -> None:
    chunks = [chunk("Ants dig.", 0, 1, 0), chunk("Bees hum.", 10, 1, 1)]
    assert len(retrieve(Fixed(found=chunks), "?", merge=False)) == 2


@pytest.mark.parametrize("kind", ["similarity", "mmr"])
@pytest.mark.parametrize("store", [FaissStore, InMemoryVectorStore])
def test_a_store_gives_the_nearest_passages_with_scores(embeddings, store, kind) -> None:
    splitter = SentenceSplitter(FakeEmbedder().count_tokens, 12, 0)
    text = "\n\n".join(f"The {animal} is an animal of its own kind." for animal in ("ant", "llama", "whale", "zebra"))
    filled = store(embeddings)
    filled.add_documents(splitter.split_documents([Document(text, metadata={"source": "a.txt"})]))
    passages = retrieve(filled, "Tell me of the llama", Search(k=2, kind=kind), merge=False)
    assert len(passages) == 2
    assert "llama" in passages[0].text
    assert passages[0].score is not None and 0.0 < passages[0].score <= 1.0
    assert (passages[0].source, passages[0].start, passages[0].end) == ("a.txt", 3, 3)


def test_mmr_prefers_passages_that_differ(embeddings) -> None:
    store = FaissStore(embeddings)
    store.add_texts(["llamas eat grass", "llamas eat grass too", "llamas spit at strangers"])
    near = [passage.text for passage in retrieve(store, "llamas eat grass", Search(k=2))]
    assert near == ["llamas eat grass", "llamas eat grass too"]
    apart = retrieve(store, "llamas eat grass", Search(k=2, kind="mmr", lambda_mult=0.1))
    assert [passage.text for passage in apart] == ["llamas eat grass", "llamas spit at strangers"]


@pytest.mark.parametrize("options", [{"k": 0}, {"lambda_mult": 1.5}])
def test_impossible_searches_are_refused(options) -> None:
    with pytest.raises(UsageError):
        Search(**options)


# Reranking ----------------------------------------------------------------------------------------------------------
class ByLength:
    """Scores a passage by how long it is."""

    name, languages, fingerprint = "length", "en", "0" * 64

    def __init__(self) -> None:
        self.read: list[str] = []

    def scores(self, question, texts):
        self.read += texts
        return np.array([len(text) for text in texts], np.float32)


def test_a_reranker_orders_the_best_chunks_and_leaves_those_past_them_behind() -> None:
    found = [Document("x" * length) for length in (3, 1, 2, 9)]
    reranker = ByLength()
    passages = retrieve(Fixed(found=found), "?", Search(3, fetch_k=3), reranker=reranker, merge=False)
    assert [len(passage.text) for passage in passages] == [3, 2, 1]
    assert [passage.metadata["rerank"] for passage in passages] == [3.0, 2.0, 1.0]
    assert len(reranker.read) == 3
    wider = retrieve(Fixed(found=found), "?", Search(4, fetch_k=2), reranker=reranker, merge=False)
    assert [len(passage.text) for passage in wider] == [3, 1, 2, 9]
    assert [len(p.text) for p in retrieve(Fixed(found=found), "?", Search(1, fetch_k=4), reranker=reranker)] == [9]
