"""Follow-up questions and sessions."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calpaca.core.sessions import Sessions
from calpaca.testing import fake_runtime
from calpaca_retrieval_qa.app import build
from calpaca_retrieval_qa.options import RetrievalQAOptions
from calpaca_retrieval_qa.rewriting import fault, stands_alone


@pytest.mark.parametrize(
    ("text", "question", "turns", "wrong"),
    [
        ("When was Ada Morrow born?", "When was she born?", "Q: Who founded it?\nA: Ada Morrow did.", ""),
        ("莫雅达什么时候出生？", "她什么时候出生？", "Q: 谁创立的？\nA: 莫雅达。", ""),
        ("Ada Morrow was born in 1930.", "When was she born?", "A: Ada Morrow did.", "no question"),
        ("Who painted the Night Watch?", "When was she born?", "A: Ada Morrow did.", "something else"),
        ("When was Rembrandt born?", "When was she born?", "A: Ada Morrow did.", "something new"),
        ("", "When?", "", "no question"),
        ("他几点开门？", "它几点开门？", "Q: 门票多少钱？\nA: 四欧元。", "still refers"),
    ],
)
def test_a_rewriting_is_used_only_if_it_asks_the_same_in_known_words(text, question, turns, wrong) -> None:
    assert wrong in fault(text, question, turns)
    assert bool(fault(text, question, turns)) is bool(wrong)


@pytest.mark.parametrize(
    ("question", "alone"),
    [
        ("When did she found it?", False),
        ("And the price for children?", False),
        ("Why?", False),
        ("What does a ticket cost?", True),
        ("Who keeps the other key?", False),
        ("门票多少钱？", True),
        ("它多重？", False),
        ("孩子呢？", False),
        ("主望远镜的主镜口径是多少？", True),
    ],
)
def test_only_a_question_that_refers_to_the_turns_is_rewritten(question, alone) -> None:
    assert stands_alone(question) is alone


ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "animals.txt"
    file.write_text("\n\n".join(f"The {animal} of this house likes dish {n}." for n, animal in enumerate(ANIMALS)))
    return file


def script(prompt: str) -> str:
    if "Rewritten:" in prompt:
        return "What does the cat like?" if "last question: and the cat" in prompt.lower() else "Nonsense."
    return (
        "It likes dish 2."
        if "cat of this house" in prompt.rsplit("Most relevant:", maxsplit=1)[-1]
        else "It likes dish 0."
    )


def answerer(document: Path, **options):
    runtime = fake_runtime(script)
    wanted = RetrievalQAOptions(files=[document], chunk_size=10, chunk_overlap=0, k=2, **options)
    return build(wanted, runtime), runtime.fake.engine


def test_a_follow_up_question_is_rewritten_and_asked_without_the_turns(document) -> None:
    qa, engine = answerer(document)
    turns = [{"role": "user", "content": "What does the ant like?"}, {"role": "assistant", "content": "Dish 0."}]
    value = qa.invoke("And the cat?", history=turns)
    assert value["searched"] == "What does the cat like?"
    assert any("Understood as" in notice for notice in value["notices"])
    rewriting, asked = engine.prompts
    assert "What does the ant like?" in rewriting
    assert "What does the ant like?" not in asked
    assert "What does the cat like?" in asked
    value = qa.invoke("What does the dog like?", history=turns)
    assert len(engine.prompts) == 3
    assert "the ant like" not in engine.prompts[-1]
    value = qa.invoke("And why?", history=turns)  # its rewriting is nonsense
    assert value["searched"] == "What does the ant like?\nAnd why?"
    assert "What does the ant like?" in engine.prompts[-1]


def test_a_session_goes_on_where_it_ended(document) -> None:
    qa, _ = answerer(document, session="pets")
    qa.invoke("What does the ant like?")
    again, engine = answerer(document, session="pets")
    again.invoke("And the cat?")
    assert "What does the ant like?" in engine.prompts[0]
    session = again.session.session
    path = session.path()
    assert [message.role for message in path] == ["user", "assistant"] * 2
    assert [message.content for message in path[::2]] == ["What does the ant like?", "And the cat?"]
    assert path[3].metadata["searched"] == "What does the cat like?"
    assert path[3].metadata["citations"][0]["source"] == str(document)
    asked = path[2].metadata["app"]
    assert (asked["name"], asked["input"], asked["options"]["files"]) == (
        "retrieval_qa",
        "And the cat?",
        [str(document)],
    )
    assert session.record.setup == {"app": "retrieval_qa"}
    other, engine = answerer(document, session="other")
    other.invoke("And the cat?")
    assert len(engine.prompts) == 1


def test_no_rewriting_is_asked_for_when_it_is_not_wanted(document) -> None:
    qa, engine = answerer(document, session="pets", rewrite=False)
    qa.invoke("What does the ant like?")
    qa.invoke("And the cat?")
    assert not any("Rewritten:" in prompt for prompt in engine.prompts)


# The store ----------------------------------------------------------------------------------------------------------
def test_a_conversation_about_documents_is_listed_searched_and_shown_with_its_sources(
    document, calpaca_program
) -> None:
    runtime = fake_runtime(script)
    ask = [
        "run",
        "retrieval_qa",
        "--file",
        str(document),
        "--chunk-size",
        "10",
        "--chunk-overlap",
        "0",
        "--session",
        "宠物",
    ]
    assert calpaca_program(*ask, "--question", "What does the cat like?", runtime=runtime).code == 0
    (listed,) = calpaca_program("sessions", "list", "--json", runtime=runtime).json
    assert (listed["title"], listed["with"], listed["messages"]) == ("宠物", "retrieval_qa", 2)
    (found,) = calpaca_program("sessions", "search", "dish", "--json", runtime=runtime).json
    assert found["metadata"]["citations"][0]["quote"] == "The cat of this house likes dish 2."
    shown = calpaca_program("sessions", "show", "宠物", runtime=runtime).out
    assert "It likes dish 2. [1]\n\n1. " in shown
    assert shown.rstrip().endswith("animals.txt, line 5")
    assert calpaca_program("sessions", "remove", "宠物", runtime=runtime).code == 0
    assert calpaca_program("sessions", "list", runtime=runtime).out == ""


WRITER = """
import sys
from pathlib import Path
from calpaca.core.sessions import Sessions
from calpaca_retrieval_qa.session import KeptConversation
conversation = KeptConversation(Sessions(Path(sys.argv[1])).find("s"))
print("ready", flush=True)
for number in range(100_000):
    conversation.keep(f"{sys.argv[2]}{number}", {"answer": "x" * 200, "sources": []})
    print(number, flush=True)
"""


def test_a_kill_loses_no_turn_that_was_finished_and_leaves_no_half_one(tmp_path) -> None:
    sessions, pick = Sessions(tmp_path / "s.sqlite"), random.Random(5)
    session = sessions.resume("s", {})
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(sessions.path), name], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    time.sleep(pick.uniform(0.02, 0.2))
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
    path = session.path()
    asked = {message.content for message in path if message.role == "user"}
    for writer, name in zip(writers, "ab", strict=True):
        numbers = [int(line) for line in writer.communicate()[0].split() if line.isdigit()]
        assert {f"{name}{number}" for number in numbers[:-1]} <= asked
    assert [message.role for message in path] == ["user", "assistant"] * (len(path) // 2)
