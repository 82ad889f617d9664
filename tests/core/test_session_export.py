"""Sessions as files and back."""

import json

import pytest

from calpaca.core.errors import SessionError, UsageError
from calpaca.core.session_export import exported, imported
from calpaca.core.sessions import Session, Sessions


@pytest.fixture
def sessions(tmp_path) -> Sessions:
    return Sessions(tmp_path / "sessions.sqlite")


@pytest.fixture
def session(sessions) -> Session:
    """A conversation whose question was edited, and whose last answer was cut short."""
    session = sessions.new({"model": "small"}, "羊驼")
    session.add("system", "Be brief.")
    asked = session.add("user", "What is a lama?")
    session.add("assistant", "A monk.", {"model": "small"})
    session.edit(asked.id, "What is a llama?")
    written = session.begin_answer()
    written.write("A came")
    written.finish({}, complete=False)
    return session


def tree(session: Session) -> list[tuple]:
    messages = session.tree()
    places = {message.id: place for place, message in enumerate(messages)} | {None: None}
    return [(places[each.parent], each.role, each.content, each.complete, dict(each.metadata)) for each in messages]


def test_json_brings_back_every_branch_and_the_place_in_the_tree(session, sessions, tmp_path):
    file = tmp_path / "talk.json"
    file.write_text(exported(session, ".json"), encoding="utf-8")
    (copy,) = imported(sessions, file)
    assert tree(copy) == tree(session)
    assert [message.content for message in copy.path()] == [message.content for message in session.path()]
    assert (copy.record.title, copy.record.setup) == ("羊驼", {"model": "small"})


def test_markdown_is_the_conversation_as_it_stands(session):
    assert exported(session, ".md") == (
        "# 羊驼\n\n## System text\n\nBe brief.\n\n## Question\n\nWhat is a llama?\n\n## Answer (not complete)\n\nA came\n"
    )


def test_a_sharegpt_row_goes_out_and_comes_in(session, sessions, tmp_path):
    row = json.loads(exported(session, ".jsonl"))
    assert [each["from"] for each in row["conversations"]] == ["system", "human", "gpt"]
    file = tmp_path / "rows.jsonl"
    openai = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    file.write_text(json.dumps(row) + "\n" + json.dumps(openai), encoding="utf-8")
    first, second = imported(sessions, file)
    assert [message.content for message in first.path()] == ["Be brief.", "What is a llama?", "A came"]
    assert [(message.role, message.content) for message in second.path()] == [("user", "hi"), ("assistant", "hello")]
    assert second.record.title == "rows"


@pytest.mark.parametrize(
    "text",
    ["no json", "{}", '{"head": 1, "messages": [{"role": "user"}]}', '{"conversations": [{"from": "nobody"}]}', "7"],
)
def test_a_file_that_holds_no_session_is_named_and_nothing_is_kept(sessions, tmp_path, text):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(SessionError, match=r"bad\.json holds no session"):
        imported(sessions, file)
    assert sessions.records() == []


def test_another_form_is_refused(session):
    with pytest.raises(UsageError, match=r"is not written as '\.docx'"):
        exported(session, ".docx")
