"""The app with a fake model and embedder: what is asked, reported and refused."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.vectorstores import InMemoryVectorStore

from calpaca.core.errors import ContextOverflowError, DocumentError, UsageError
from calpaca.core.events import ContextReport, Notice, Progress, Result, Source, Step, Token, UsageReport
from calpaca.documents.retrieval import Search
from calpaca.documents.vectors import PreparedEmbeddings
from calpaca.testing import FakeEmbedder, fake_runtime
from calpaca_retrieval_qa.app import RetrievalQA, build
from calpaca_retrieval_qa.indexing import build as build_job
from calpaca_retrieval_qa.options import RetrievalIndexOptions, RetrievalQAOptions

ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]
QUESTION = "What does the dog like?"


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "animals.txt"
    file.write_text(
        "\n\n".join(f"The {animal} of this house likes dish number {n}." for n, animal in enumerate(ANIMALS))
    )
    return file


def options(file: Path, **changes) -> RetrievalQAOptions:
    return RetrievalQAOptions(**({"files": [file], "chunk_size": 10, "chunk_overlap": 0} | changes))


def kinds(events: list) -> list[type]:
    """The kinds of events in their order, each run once."""
    types = [type(event) for event in events]
    return [kind for place, kind in enumerate(types) if place == 0 or types[place - 1] is not kind]


def test_stuff_reports_indexing_the_answer_and_its_sources(document) -> None:
    runtime = fake_runtime(["Dish number 3."])
    events = list(build(options(document), runtime).stream(QUESTION))
    assert kinds(events) == [Progress, Notice, Step, Token, Source, UsageReport, ContextReport, Result]
    value = events[-1].value
    assert value["answer"] == "Dish number 3. [1]" == "".join(e.text for e in events if isinstance(e, Token))
    (cited,) = [event for event in events if isinstance(event, Source)]
    assert cited.text == value["citations"][0]["quote"] == "The dog of this house likes dish number 3."
    assert (cited.start, cited.end) == (7, 7)
    assert value["context"]["sent_tokens"] == value["usage"]["prompt_tokens"] > 0
    assert value["strategy"] == "stuff"
    assert value["model"] == runtime.fake.name
    assert set(value["sources"][0]) == {
        *("source", "page", "start", "end", "text", "score", "start_offset", "end_offset")
    }
    assert value["usage"]["completion_tokens"] > 0
    assert list(value["timings"]) == ["index", "retrieve", "first_token", "total"]
    prompt = runtime.fake.engine.prompts[0]
    assert all(prompt.index(source["text"]) < prompt.index(QUESTION) for source in value["sources"])


def test_refine_asks_once_for_each_passage_and_shows_the_answer_so_far(document) -> None:
    runtime = fake_runtime(["draft one", "draft two", "draft three", "the end"])
    runner = build(options(document, strategy="refine", k=4), runtime)
    events = list(runner.stream(QUESTION))
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.index, step.total) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    value = events[-1].value
    assert value["intermediate_steps"] == ["draft one", "draft two", "draft three", "the end"]
    assert value["answer"] == "the end"
    assert "".join(event.text for event in events if isinstance(event, Token) and event.step == 2) == "draft two"
    prompts = runtime.fake.engine.prompts
    for number, source in enumerate(value["sources"]):
        assert source["text"] in prompts[number]
    assert [("draft" in prompt) for prompt in prompts] == [False, True, True, True]


def test_invoke_and_astream_give_what_stream_gives(document) -> None:
    value = build(options(document, cite="off"), fake_runtime(["Dish."])).invoke(QUESTION)
    assert value["answer"] == "Dish."


async def test_astream_gives_the_same_events(document) -> None:
    runner = build(options(document, cite="off"), fake_runtime(["Dish."]))
    events = [event async for event in runner.astream(QUESTION)]
    assert events[-1].value["answer"] == "Dish."


def test_a_question_that_the_documents_do_not_touch_is_not_asked(document) -> None:
    runtime = fake_runtime(["Paris."])
    value = build(options(document), runtime).invoke("Quantum chromodynamics Lagrangian?")
    assert value["answer"] == "The documents say nothing about this."
    assert value["sources"] == []
    assert runtime.fake.engine.prompts == []
    zh = build(options(document), fake_runtime(["巴黎。"])).invoke("法国的首都是哪里")
    assert zh["answer"]  # another script than the documents: with unknown scores the model is asked


def test_uncalibrated_scores_are_remarked(document) -> None:
    value = build(options(document), fake_runtime(["Dish."])).invoke(QUESTION)
    assert any("'fake'" in line or "fake are not calibrated" in line for line in value["notices"])


def test_the_second_question_finds_the_index_ready(document) -> None:
    runtime = fake_runtime(["Dish."])
    runner = build(options(document), runtime)
    runner.invoke(QUESTION)
    runtime.fake_embedder.texts.clear()
    assert Progress not in kinds(list(runner.stream("And what does the cat of the house like?")))
    assert Progress not in kinds(list(build(options(document), runtime).stream(QUESTION)))
    assert runtime.fake_embedder.texts == []


# Reranking ----------------------------------------------------------------------------------------------------------
class DogsFirst:
    """A reranker that looks for one word, and knows English."""

    name, languages, fingerprint = "dogs", "en", "0" * 64

    def scores(self, question, texts):
        return np.array([("dog" in text) - 0.5 for text in texts], np.float32)


def test_a_reranker_chooses_what_the_model_reads(document) -> None:
    runtime = fake_runtime(["Dish."])
    runtime._rerankers["dogs"] = DogsFirst()
    given = options(document, rerank="dogs", k=1)
    value = build(given, runtime).invoke("What does the hen of this house like?")
    (read,) = value["sources"]
    assert (read["text"], read["rerank"]) == ("The dog of this house likes dish number 3.", 0.5)
    assert not any("English only" in notice for notice in value["notices"])
    value = build(given, runtime).invoke("母鸡喜欢什么？")
    assert any("reranker dogs knows English only" in notice for notice in value["notices"])
    with pytest.raises(UsageError, match="--rerank and --search mmr"):
        build(options(document, rerank="dogs", search="mmr"), runtime)


# The context --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["stuff", "refine"])
def test_passages_without_room_are_named(document, tmp_path, strategy) -> None:
    folder = tmp_path / "animals"
    folder.mkdir()
    for animal in ANIMALS:
        (folder / f"{animal}.txt").write_text(f"The {animal} likes its dish. " + "It eats a lot every day. " * 3)
    (folder / "dog.txt").write_text("The dog likes bones.")
    runtime = fake_runtime(["Dish."], context_length=800)
    runner = build(options(folder, max_new_tokens=100, k=8, chunk_size=30, strategy=strategy), runtime)
    runner.search = Search(k=8)
    long = "The dog likes this a lot. " * 40
    runner.retriever.store.add_texts([long], [{"source": "long.txt", "start_line": 7, "end_line": 9}], ids=["long"])
    events = list(runner.stream(QUESTION))
    left_out = [event.text for event in events if isinstance(event, Notice) and event.text.startswith("Left out")]
    assert "long.txt, lines 7-9" in " ".join(left_out)
    assert events[-1].value["sources"]
    assert all(len(prompt.encode()) + 100 <= 800 for prompt in runtime.fake.engine.prompts)


def test_a_prompt_that_fits_in_no_way_is_an_error_with_numbers(document) -> None:
    runtime = fake_runtime(["Dish."], context_length=100)
    with pytest.raises(ContextOverflowError, match="the context holds 100"):
        build(options(document, max_new_tokens=50), runtime).invoke(QUESTION)


# The turns before ---------------------------------------------------------------------------------------------------
TURNS = [{"role": "user", "content": "What does the dog like {now}?"}, {"role": "assistant", "content": "Dish 3."}]


@pytest.mark.parametrize("strategy", ["stuff", "refine"])
def test_a_follow_up_question_is_looked_up_and_asked_with_the_turns_before_it(document, strategy) -> None:
    runtime = fake_runtime(["Dish."] * 20)
    runner = build(options(document, strategy=strategy, k=1), runtime)
    value = runner.invoke("And why?", history=TURNS)
    assert "dog" in value["sources"][0]["text"]
    assert all("like {now}?" in prompt and "Dish 3." in prompt for prompt in runtime.fake.engine.prompts)
    assert value == {**[*runner.stream("And why?", history=TURNS)][-1].value, "timings": value["timings"]}
    assert not any("oldest" in notice for notice in value["notices"])


def test_a_question_about_something_else_is_looked_up_alone(document) -> None:
    runtime = fake_runtime(["Dish."] * 20)
    other = [{"role": "user", "content": "Quantum chromodynamics, lattice spacing, renormalisation, beta functions?"}]
    value = build(options(document, k=1), runtime).invoke(QUESTION, history=other)
    assert "dog" in value["sources"][0]["text"]


def test_the_oldest_turns_make_room_and_that_is_said(document) -> None:
    runtime = fake_runtime(["Dish."] * 20, context_length=2000)
    turns = [{"role": role, "content": f"{n} " * 30} for n in range(8) for role in ("user", "assistant")]
    value = build(options(document, max_new_tokens=50), runtime).invoke("And why?", history=[*turns, *TURNS])
    assert any("oldest messages" in notice for notice in value["notices"])
    for prompt in runtime.fake.engine.prompts:  # for the rewriting, and for the answer
        assert "like {now}?" in prompt
        assert "0 0 0" not in prompt
        assert len(prompt.encode()) + 50 <= 2000


async def test_a_chat_model_of_langchain_gets_the_turns_as_messages() -> None:
    asked = []

    class Listening(FakeListChatModel):
        def _stream(self, messages, *args, **kwargs):
            asked.append([message.type for message in messages])
            yield from super()._stream(messages, *args, **kwargs)

    qa = RetrievalQA(Listening(responses=["a"]), filled_store())
    events = [event async for event in qa.astream("Does it like that dish?", history=TURNS)]
    assert events[-1].value["answer"] == "a"
    assert qa.bind(history=TURNS).invoke("Does it like that dish?")["answer"] == "a"
    assert asked == [["human", "ai", "human"]] * 2


# Wrong use ----------------------------------------------------------------------------------------------------------
def test_wrong_options_are_refused_before_anything_is_loaded(document, tmp_path) -> None:
    runtime = fake_runtime(["Dish."])
    for changes, error in (
        ({"files": []}, UsageError),
        ({"files": [tmp_path / "none.txt"]}, DocumentError),
        ({"k": 0}, UsageError),
        ({"mmr_lambda": 2}, UsageError),
        ({"store": "fais"}, UsageError),
        ({"chunk_overlap": 99}, UsageError),
        ({"prompt_file": tmp_path / "none.toml"}, UsageError),
    ):
        with pytest.raises(error):
            build(options(document, **changes), runtime)
    with pytest.raises(UsageError, match="question is empty"):
        build(options(document), runtime).invoke("  ")


# LangChain ----------------------------------------------------------------------------------------------------------
def filled_store() -> InMemoryVectorStore:
    store = InMemoryVectorStore(PreparedEmbeddings(FakeEmbedder()))
    store.add_documents([Document(f"The {animal} likes dish {n}.") for n, animal in enumerate(ANIMALS)])
    return store


@pytest.mark.parametrize("llm", [FakeListChatModel, FakeListLLM])
@pytest.mark.parametrize("strategy", ["stuff", "refine"])
def test_any_model_of_langchain_answers_from_any_store(llm, strategy) -> None:
    qa = RetrievalQA(llm(responses=["a", "b", "c", "d"]), filled_store(), strategy=strategy, search=Search(k=4))
    assert qa.invoke(QUESTION)["answer"] == ("a" if strategy == "stuff" else "d")


def test_any_retriever_can_be_handed_in() -> None:
    qa = RetrievalQA(FakeListChatModel(responses=["a"]), filled_store().as_retriever(search_kwargs={"k": 5}))
    assert len(qa.invoke(QUESTION)["sources"]) == 4


def test_a_retriever_of_langchain_community_can_be_handed_in() -> None:
    pytest.importorskip("rank_bm25")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # langchain-community says on import that it is being sunset
        from langchain_community.retrievers import BM25Retriever
    retriever = BM25Retriever.from_texts([f"The {animal} likes dish {n}." for n, animal in enumerate(ANIMALS)])
    assert RetrievalQA(FakeListChatModel(responses=["a"]), retriever).invoke(QUESTION)["answer"] == "a"


async def test_the_app_shows_up_in_langchains_events() -> None:
    qa = RetrievalQA(FakeListChatModel(responses=["ab"]), filled_store())
    names = [event["event"] async for event in qa.astream_events(QUESTION, version="v2")]
    assert "on_chat_model_start" in names


# The index job ------------------------------------------------------------------------------------------------------
def test_the_job_builds_the_index_that_the_answerer_uses(document) -> None:
    runtime = fake_runtime(["Dish."])
    job = build_job(RetrievalIndexOptions(files=[document], chunk_size=10, chunk_overlap=0), runtime)
    value = list(job.events())[-1].value
    assert value["chunks"] == value["embedded"] == 8
    assert (value["files"], value["reused"]) == (1, 0)
    assert job.status().state == "done"
    assert Progress not in kinds(list(build(options(document), runtime).stream(QUESTION)))
    again = list(build_job(RetrievalIndexOptions(files=[document], chunk_size=10, chunk_overlap=0), runtime).events())
    assert again[-1].value["embedded"] == 0


def test_a_cancelled_job_is_taken_up_again_from_its_record(document) -> None:
    runtime = fake_runtime(["Dish."], embedder=SmallBatches())
    job = build_job(RetrievalIndexOptions(files=[document], chunk_size=10, chunk_overlap=0), runtime)
    events = job.events()
    next(events)
    events.close()
    record = runtime.jobs.get(job.id)
    assert (record.state, record.done) == ("cancelled", 2)
    resumed = build_job(RetrievalIndexOptions(**record.parameters), runtime)
    assert resumed.id == job.id
    value = list(resumed.events())[-1].value
    assert (value["embedded"], value["reused"], value["chunks"]) == (6, 2, 8)


class SmallBatches(FakeEmbedder):
    batch_size = 2


CHILD = """
import sys, time
from pathlib import Path
from calpaca_retrieval_qa.indexing import build
from calpaca_retrieval_qa.options import RetrievalIndexOptions
from calpaca.testing import FakeEmbedder, fake_runtime

class Slow(FakeEmbedder):
    batch_size = 4
    def embed_documents(self, texts):
        time.sleep(0.01)
        return super().embed_documents(texts)

runtime = fake_runtime(embedder=Slow())
job = build(RetrievalIndexOptions(files=[Path(sys.argv[1])], chunk_size=10, chunk_overlap=0), runtime)
print("ready", flush=True)
for event in job.events():
    pass
"""


def test_a_killed_job_ends_in_the_same_index_and_repeats_no_finished_step(document, tmp_path) -> None:
    document.write_text("\n\n".join(f"The {animal} likes dish {n}." for n in range(50) for animal in ANIMALS))
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(document)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(random.Random(seed).uniform(0.05, 1.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    wanted = RetrievalIndexOptions(files=[document], chunk_size=10, chunk_overlap=0)
    runtime = fake_runtime()
    recorded = runtime.jobs.jobs()[0]
    assert recorded.state == "interrupted"
    value = list(build_job(wanted, runtime).events())[-1].value
    assert value["reused"] >= recorded.done, f"seed {seed}"
    assert value["reused"] + value["embedded"] == value["chunks"], f"seed {seed}"
    assert len(runtime.fake_embedder.texts) == value["embedded"]
    resumed = everything(wanted, runtime)
    shutil.rmtree(tmp_path / "cache")
    list(build_job(wanted, runtime).events())
    assert everything(wanted, runtime) == resumed, f"seed {seed}"


def everything(wanted: RetrievalIndexOptions, runtime) -> list:
    """Documents and scores of the whole index."""
    store = wanted.index(runtime, None).store
    return [(d.id, d.page_content, d.metadata, s) for d, s in store.similarity_search_with_score("dish", k=10_000)]
