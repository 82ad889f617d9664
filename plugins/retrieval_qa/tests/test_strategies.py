"""Which prompts are sent, by strategy and context policy, and what is said of what found no room."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore

from calpaca.core.engine import Sampling
from calpaca.core.errors import ContextOverflowError
from calpaca.core.events import Notice, Step, Token
from calpaca.core.langchain import ChatCalpaca
from calpaca.documents.retrieval import Search
from calpaca.documents.vectors import PreparedEmbeddings
from calpaca.testing import FakeEmbedder, fake_runtime
from calpaca_retrieval_qa.app import RetrievalQA

QUESTION = "What does the dog like?"
ROOM = 40


def answerer(answers, context_length: int, **arguments):
    """An answerer over four passages of 100 letters each, which are as many tokens of the fake model, and its engine."""
    runtime = fake_runtime(answers, context_length=context_length)
    store = InMemoryVectorStore(PreparedEmbeddings(FakeEmbedder()))
    texts = [f"The {animal} likes dish {n}. ".ljust(100, "x") for n, animal in enumerate(["dog", "cat", "hen", "fox"])]
    places = [{"source": f"{n}.txt", "start": 0, "end": 100, "start_line": 1} for n in range(4)]
    store.add_texts(texts, places)
    llm = ChatCalpaca.from_model(runtime.model(), Sampling(max_new_tokens=ROOM))
    qa = RetrievalQA(llm, store, search=Search(4), max_new_tokens=ROOM, **arguments)
    return qa, runtime.fake.engine


def whole_prompt() -> int:
    """Tokens of the prompt with all four passages."""
    qa, engine = answerer(["Dish 0."], 32_768)
    qa.invoke(QUESTION)
    return len(engine.prompts[0].encode())


def test_auto_stuffs_as_long_as_the_rendered_prompt_fits_to_the_token() -> None:
    limit = whole_prompt() + ROOM
    qa, engine = answerer(["Dish 0."], limit, strategy="auto")
    assert qa.invoke(QUESTION)["strategy"] == "stuff"
    assert len(engine.prompts) == 1
    qa, engine = answerer(["Dish 0."], limit - 1, strategy="auto")
    value = qa.invoke(QUESTION)
    assert value["strategy"] == "map_rerank"
    assert len(engine.prompts) == len(value["sources"]) == 4
    assert value["context"]["dropped"] == 0


def test_map_rerank_asks_about_all_passages_at_once_and_shows_the_answer_that_is_backed_best() -> None:
    qa, engine = answerer(
        lambda prompt: "It is dish 0." if "dog likes" in prompt else "A moon.", 32_768, strategy="map_rerank"
    )
    events = list(qa.stream(QUESTION))
    value = events[-1].value
    assert value["answer"] == "It is dish 0. [1]"
    assert sorted(value["intermediate_steps"]) == ["A moon.", "A moon.", "A moon.", "It is dish 0."]
    assert [event.total for event in events if isinstance(event, Step)] == [5] * 5
    assert "".join(event.text for event in events if isinstance(event, Token) and event.step == 5) == value["answer"]
    assert engine.peak > 1
    assert value["context"]["prompts"] == 4


class Shelf(BaseRetriever):
    """Gives out the same documents whatever is asked."""

    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


def test_another_question_about_the_same_passages_begins_with_the_same_prompt() -> None:
    qa, engine = answerer(["Dish."], 32_768)
    qa.retriever = Shelf(documents=[Document(f"The dog likes dish {n}. ".ljust(100, "x")) for n in range(4)])
    qa.invoke(QUESTION)
    qa.invoke("Which dish does the dog like?")
    first, second = engine.prompts
    shared = first[: first.index("Most relevant")]
    assert second.startswith(shared)
    assert len(shared) > 0.5 * len(first)


@pytest.mark.parametrize(("policy", "prompts"), [("drop", 1), ("refine", 4), ("summarise", 3)])
def test_a_policy_decides_what_becomes_of_passages_without_room(policy, prompts) -> None:
    limit = whole_prompt() + ROOM - 60
    answers = lambda prompt: "They eat." if "Sum up" in prompt else "Dish 0."  # noqa: E731
    qa, engine = answerer(answers, limit, context_policy=policy)
    events = list(qa.stream(QUESTION))
    use = events[-1].value["context"]
    assert len(engine.prompts) == prompts
    assert all(len(prompt.encode()) + ROOM <= limit for prompt in engine.prompts)
    assert use["policy"] == policy
    said = [event.text for event in events if isinstance(event, Notice) and "context is full" in event.text]
    assert len(said) == use["dropped"] == {"drop": 1, "refine": 0, "summarise": 2}[policy]
    assert (use["dropped_tokens"] > 0) is (policy != "refine")
    if policy == "summarise":
        assert use["summary"] == "They eat. They eat."
        assert "They eat. They eat." in engine.prompts[-1]
        assert all("They eat" not in citation["quote"] for citation in events[-1].value["citations"])


def test_the_policy_error_sends_nothing_and_says_by_how_much_it_is_too_long() -> None:
    whole = whole_prompt()
    qa, engine = answerer(["Dish."], whole + ROOM - 60, context_policy="error")
    with pytest.raises(ContextOverflowError, match=f"{whole}"):
        qa.invoke(QUESTION)
    assert engine.prompts == []


def test_strict_shows_nothing_that_no_passage_backs() -> None:
    qa, _ = answerer(["The dog likes dish 0. It is 99 now."], 32_768, cite="strict")
    value = qa.invoke(QUESTION)
    assert value["answer"] == "The dog likes dish 0. [1]"
    assert value["removed"]["claims"] == ["It is 99 now."]
    assert any("no passage backs" in notice for notice in value["notices"])
    qa, _ = answerer(["It is 99 now."], 32_768, cite="strict")
    value = qa.invoke(QUESTION)
    assert value["answer"] == "The documents say nothing about this."
    assert value["supported"] is False


def test_no_chat_model_of_langchain_can_write_a_citation_of_its_own() -> None:
    qa, _ = answerer(["x"], 32_768)
    qa.llm = FakeListChatModel(responses=["Bones from 1066 [7]."])
    value = qa.invoke(QUESTION)
    assert value["answer"] == "Bones from 1066."
    assert value["citations"] == []
    assert value["removed"]["markers"] == 1
    assert any("made up" in notice for notice in value["notices"])
