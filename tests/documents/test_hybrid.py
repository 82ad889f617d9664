from pathlib import Path

import numpy as np
import pytest
from langchain_core.vectorstores import InMemoryVectorStore

from calpaca.core.errors import UsageError
from calpaca.documents import fusion, keywords
from calpaca.documents.retrieval import retrieve
from calpaca.documents.search import ChunkFilter, Search
from calpaca.documents.vectors import PreparedEmbeddings
from calpaca.testing import FakeEmbedder

KINDS = ["hybrid", "rrf", "similarity", "keywords", "mmr"]


def test_terms_are_words_and_pairs_of_chinese_characters() -> None:
    assert keywords.terms("The GPU's 挂在钟 A4纸 No_1, ラマ") == [
        *("The", "GPU", "s", "挂在", "在钟", "A4", "纸", "No", "1", "ラマ"),
    ]  # fmt: skip


def test_a_question_is_looked_up_without_words_that_say_nothing() -> None:
    assert keywords.query_terms("What does the llama do, the llama?") == ["llama"]
    assert keywords.query_terms("Who is it?") == ["Who", "is", "it"]


# Fusion ----------------------------------------------------------------------------------------------------------------
def test_fusion_adds_reciprocal_ranks() -> None:
    assert fusion.by_ranks([["a", "b", "c"], ["c", "b", "d"]], constant=1) == ["c", "b", "a", "d"]
    assert fusion.by_ranks([["a", "b"], []]) == ["a", "b"]


def test_fusion_does_not_depend_on_the_scale_of_similarities() -> None:
    similarities, shares = np.array([0.9, 0.8, 0.1], np.float32), np.array([0.0, 0.1, 0.3], np.float32)
    scores = fusion.by_scores(similarities, shares, nearest=3)
    squeezed = fusion.by_scores(0.7 + similarities / 100, shares, nearest=3)
    assert scores == pytest.approx(squeezed, abs=1e-3)
    assert list(fusion.by_scores(similarities, 0 * shares, nearest=3).argsort()) == [2, 1, 0]


def test_fusion_of_equal_similarities_goes_by_words() -> None:
    scores = fusion.by_scores(np.full(3, 0.5, np.float32), np.array([0.1, 0.0, 0.2], np.float32), nearest=50)
    assert list(scores.argsort()) == [1, 0, 2]


# An index --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def index(make_index, tmp_path: Path):
    lines = ["The llama hums at night.", "A whale swims far away.", "Keys hang behind the clock.", "钥匙挂在钟的后面。"]
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    return make_index(tmp_path / "a.txt", chunk_size=8)


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("Whales swimming", "A whale swims far away."),
        ("behind a clock?", "Keys hang behind the clock."),
        ("钥匙在哪里？", "钥匙挂在钟的后面。"),
    ],
)
def test_words_are_found_by_stem_and_in_chinese(index, sync, question: str, text: str) -> None:
    sync(index)
    (best,) = index.store.get_by_ids(list(index.manifest.search(question, 1)))
    assert best.page_content == text


def test_the_share_of_words_is_high_where_all_of_them_stand_and_low_where_few_do(index, sync) -> None:
    sync(index)
    (whole,) = index.manifest.search("llama hums night", 1).values()
    (part,) = index.manifest.search("llama gallops through the desert of Peru", 1).values()
    assert 0.4 < whole <= 1.0
    assert 0.0 < part < whole / 2
    assert index.manifest.search("Wo hängen die Schlüssel?", 9) == {}


@pytest.mark.parametrize("question", ["", "？！", '"', "NEAR(", "llama AND NOT", "terms:x*", "^"])
def test_a_question_is_no_query_language(index, sync, question: str) -> None:
    sync(index)
    assert len(index.manifest.search(question, 9)) <= 1
    assert len(retrieve(index.retriever, question or "?", Search(k=2, kind="hybrid"), merge=False)) == 2


def test_words_follow_their_files(index, sync) -> None:
    sync(index)
    (path,) = index.paths
    path.write_text("The llama sings.\n\nA zebra runs over there.")
    sync(index)
    assert index.manifest.search("whale clock", 9) == {}
    assert len(index.manifest.search("zebra", 9)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_cosines_however_the_order_is_made(index, sync, kind) -> None:
    sync(index)
    passages = retrieve(index.retriever, "llama hums", Search(4, kind), merge=False)
    exact = {found.page_content: score for found, score in index.store.similarity_search_with_score("llama hums", k=4)}
    assert passages[0].text == "The llama hums at night."
    found = {passage.text: passage.score for passage in passages}
    assert found == pytest.approx({text: exact[text] for text in found}, abs=1e-3)


def test_an_index_without_vectors_of_sentences_is_searched_too(make_index, sync, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("The llama hums. The whale swims.")
    index = make_index(tmp_path / "a.txt", sentences=False)
    sync(index)
    (vectors,) = index.manifest.vectors(index.manifest.chunk_ids([str(tmp_path / "a.txt")])).values()
    assert vectors.shape == (1, 64)
    assert index.retriever.invoke("llama")[0].page_content == "The llama hums. The whale swims."


def test_the_best_sentence_of_a_chunk_counts(make_index, sync, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("Llamas hum softly. Whales swim far. Keys hang high.")
    (tmp_path / "b.txt").write_text("Whales and llamas, hum and swim, keys and clocks.")
    index = make_index(tmp_path, chunk_size=30)
    sync(index)
    ranked = retrieve(index.retriever, "Keys hang high.", Search(2, "hybrid"))
    assert [Path(passage.source).name for passage in ranked] == ["a.txt", "b.txt"]


def test_sentences_are_embedded_once_and_follow_their_chunk(make_index, runtime, sync, tmp_path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Llamas hum. Whales swim.\n\nLlamas hum.")
    index = make_index(file, chunk_size=8)
    sync(index)
    assert sorted(runtime.fake_embedder.texts) == ["Llamas hum.", "Llamas hum. Whales swim.", "Whales swim."]
    file.write_text("Llamas hum. Whales dive.")
    sync(index)
    assert runtime.fake_embedder.texts[3:] == ["Llamas hum. Whales dive.", "Whales dive."]
    names = index.manifest.chunk_ids([str(file)])
    assert [len(rows) for rows in index.manifest.vectors(names).values()] == [3]


def test_a_long_chunk_has_at_most_eight_vectors_of_sentences(make_index, sync, tmp_path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(" ".join(f"Number {n}." for n in range(50)))
    index = make_index(file, chunk_size=200)
    sync(index)
    (rows,) = index.manifest.vectors(index.manifest.chunk_ids([str(file)])).values()
    assert len(rows) == 1 + 8


# Filters ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def library(make_index, sync, tmp_path: Path):
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "a.md").write_text("# Care\n\nLlamas hum.\n\n# Food\n\nLlamas eat hay.")
    (tmp_path / "b.txt").write_text("Llamas spit.")
    index = make_index(tmp_path, chunk_size=8)
    sync(index)
    return index


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (ChunkFilter(), {"Llamas hum.", "Llamas eat hay.", "Llamas spit."}),
        (ChunkFilter(sources=("*.txt",)), {"Llamas spit."}),
        (ChunkFilter(sources=("manual/*",)), {"Llamas hum.", "Llamas eat hay."}),
        (ChunkFilter(sources=("*.txt", "a.md"), heading="food"), {"Llamas eat hay."}),
        (ChunkFilter(pages=(1, 3)), set()),
        (ChunkFilter(heading="' OR 1 --"), set()),
    ],
    ids=["all", "ending", "folder", "heading", "page", "quote"],
)
def test_only_chunks_that_a_filter_lets_through_are_found(library, kind, where, expected) -> None:
    found = retrieve(library.retriever, "What do llamas do?", Search(9, kind, where=where), merge=False)
    assert {passage.text.rpartition("\n")[2] for passage in found} == expected


def test_other_stores_refuse_what_they_cannot_do() -> None:
    store = InMemoryVectorStore(PreparedEmbeddings(FakeEmbedder()))
    for search in (Search(kind="hybrid"), Search(where=ChunkFilter(sources=("a",)))):
        with pytest.raises(UsageError, match="InMemoryVectorStore cannot be searched"):
            retrieve(store, "llama", search)


def test_a_retriever_is_one_of_langchain(index, sync) -> None:
    sync(index)
    assert index.retriever.invoke("the clock")[0].page_content == "Keys hang behind the clock."
