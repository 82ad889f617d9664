from pathlib import Path

import pytest

from calpaca.documents import keywords
from calpaca.documents.hybrid import HybridRetriever, fuse
from calpaca.documents.retrieval import Search, retrieve
from calpaca.documents.stores.faiss import FaissStore
from calpaca.documents.vectors import PreparedEmbeddings
from calpaca.testing import FakeEmbedder


def test_terms_are_words_and_pairs_of_chinese_characters() -> None:
    assert keywords.terms("The GPU's 挂在钟 A4纸 No_1, ラマ") == [
        *("The", "GPU", "s", "挂在", "在钟", "A4", "纸", "No", "1", "ラマ"),
    ]  # fmt: skip


def test_fusion_adds_reciprocal_ranks() -> None:
    assert fuse([["a", "b", "c"], ["c", "b", "d"]], constant=1) == ["c", "b", "a", "d"]
    assert fuse([["a", "b"], []]) == ["a", "b"]


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
    (best,) = index.store.get_by_ids(index.manifest.search(question, 1))
    assert best.page_content == text


@pytest.mark.parametrize("question", ["", "？！", '"', "NEAR(", "llama AND NOT", "terms:x*", "^"])
def test_a_question_is_no_query_language(index, sync, question: str) -> None:
    sync(index)
    assert len(index.manifest.search(question, 9)) <= 1
    assert len(retrieve(index.hybrid, question or "?", Search(k=2), merge=False)) == 2


def test_words_follow_their_files(index, sync) -> None:
    sync(index)
    (path,) = index.paths
    path.write_text("The llama sings.\n\nA zebra runs over there.")
    sync(index)
    assert index.manifest.search("whale clock", 9) == []
    assert len(index.manifest.search("zebra", 9)) == 1


def test_hybrid_scores_are_cosines_and_the_order_is_the_fusion(index, sync) -> None:
    sync(index)
    passages = retrieve(index.hybrid, "llama hums", Search(k=4), merge=False)
    cosines = {
        found.page_content: score for found, score in index.store.similarity_search_with_score("llama hums", k=4)
    }
    assert passages[0].text == "The llama hums at night."
    assert {passage.text: passage.score for passage in passages} == pytest.approx(cosines)


def test_what_words_alone_bring_up_gets_its_cosine_too() -> None:
    store = FaissStore(PreparedEmbeddings(FakeEmbedder(64)))
    first, second = store.add_texts(["llamas hum at night", "whales swim"])
    retriever = HybridRetriever(store=store, keywords=lambda question, k: [second, "gone"], fetch_k=1)
    ranked = retriever.ranked("llamas hum at night", 1)
    assert [document.id for document, _ in ranked] == [first]
    both = HybridRetriever(store=store, keywords=lambda question, k: ["gone", second], fetch_k=1).ranked(
        "llamas hum", 9
    )
    exact = {found.id: score for found, score in store.similarity_search_with_score("llamas hum", k=2)}
    assert {document.id: score for document, score in both} == pytest.approx(exact)


def test_a_hybrid_retriever_is_one_of_langchain(index, sync) -> None:
    sync(index)
    assert index.hybrid.invoke("the clock")[0].page_content == "Keys hang behind the clock."
