"""Conversations that are kept: branches, search, kills in mid-answer."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from calpaca.core.errors import SessionError, UsageError
from calpaca.core.sessions import Session, Sessions


@pytest.fixture
def sessions(tmp_path) -> Sessions:
    return Sessions(tmp_path / "sessions.sqlite")


def contents(session) -> list[str]:
    return [message.content for message in session.path()]


def answer(session, text: str) -> int:
    written = session.begin_answer()
    written.write(text)
    written.finish({"tokens": 1})
    return written.id


def test_a_conversation_is_the_path_to_its_head(sessions):
    session = sessions.new({"model": "small"})
    session.add("user", "What is a llama?")
    answer(session, "A camelid.")
    assert [(m.role, m.content, m.complete) for m in session.path()] == [
        ("user", "What is a llama?", True),
        ("assistant", "A camelid.", True),
    ]
    assert session.path()[1].metadata == {"tokens": 1}
    assert session.path()[0].as_message() == {"role": "user", "content": "What is a llama?"}


def test_an_edited_question_is_a_branch_and_the_first_one_stays(sessions):
    session = sessions.new({})
    first = session.add("user", "What is a lama?")
    answer(session, "A monk.")
    edited = session.edit(first.id, "What is a llama?")
    answer(session, "A camelid.")
    assert contents(session) == ["What is a llama?", "A camelid."]
    assert [message.id for message in session.siblings(edited.id)] == [first.id, edited.id]
    session.walk_to(first.id)
    assert contents(session) == ["What is a lama?", "A monk."]


def test_another_answer_is_a_sibling_of_the_first(sessions):
    session = sessions.new({})
    question = session.add("user", "Name a colour.")
    red = answer(session, "Red.")
    session.go_to(question.id)
    blue = answer(session, "Blue.")
    assert contents(session) == ["Name a colour.", "Blue."]
    assert [message.id for message in session.siblings(blue)] == [red, blue]


def test_the_title_is_the_beginning_of_the_first_question_unless_it_has_one(sessions):
    session = sessions.new({})
    session.add("system", "Be brief.")
    session.add("user", "Tell me\n\nabout " + "llamas " * 30)
    assert session.record.title.startswith("Tell me about llamas")
    assert len(session.record.title) <= 60
    session.rename("  Camelids \n ")
    session.add("user", "And alpacas?")
    assert session.record.title == "Camelids"


def test_sessions_are_listed_with_the_last_used_first_and_found_by_title_or_id(sessions):
    old, new = sessions.new({"model": "a"}, "Old"), sessions.new({}, "New")
    old.add("user", "again")
    assert [record.title for record in sessions.records()] == ["Old", "New"]
    assert sessions.records(1)[0].messages == 1
    assert sessions.find("New").id == new.id
    assert sessions.find(old.id[:5]).id == old.id
    sessions.new({}, "New")
    with pytest.raises(SessionError, match="names 2 sessions"):
        sessions.find("New")
    with pytest.raises(SessionError, match=r"Did you mean 'Old'"):
        sessions.find("Olt")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("llama", ["A llama is a camelid."]),
        ("LLAMA camel", ["A llama is a camelid."]),
        ("lama", []),
        ("羊驼", ["羊驼住在安第斯山脉。"]),
        ("驼住在", ["羊驼住在安第斯山脉。"]),
        ("驼羊", []),
        ("脉", ["羊驼住在安第斯山脉。"]),
        ("安第斯 羊", ["羊驼住在安第斯山脉。"]),
        ('"llama" OR (x', []),
        ("...", []),
        ("", []),
    ],
)
def test_messages_are_found_by_their_words_in_any_script(sessions, text: str, found: list[str]):
    session = sessions.new({})
    session.add("user", "A llama is a camelid.")
    session.add("assistant", "羊驼住在安第斯山脉。")
    assert [each.message.content for each in sessions.search(text)] == found
    assert all(each.session.id == session.id for each in sessions.search(text))


def test_what_was_streamed_is_found_once_it_is_finished_and_forgotten_with_its_session(sessions):
    session = sessions.new({})
    answer(session, "The Andes are high.")
    assert len(sessions.search("andes")) == 1
    sessions.delete(session.id)
    assert sessions.search("andes") == []
    assert sessions.records() == []
    with pytest.raises(SessionError, match="is gone"):
        _ = session.record


def test_a_fork_takes_the_conversation_as_it_stands(sessions):
    session = sessions.new({"model": "small"}, "Llamas")
    first = session.add("user", "one")
    session.edit(first.id, "two")
    copy = session.fork()
    copy.add("user", "three")
    assert (contents(copy), contents(session)) == (["two", "three"], ["two"])
    assert len(copy.tree()) == 2
    assert (copy.record.title, copy.record.setup) == ("Llamas (fork)", {"model": "small"})


def test_a_stopped_answer_says_that_it_is_not_complete(sessions):
    session = sessions.new({})
    written = session.begin_answer()
    written.write("Once upon")
    assert [(m.content, m.complete) for m in session.path()] == [("Once upon", False)]
    written.write(" a time")
    written.finish({}, complete=False)
    assert [(m.content, m.complete) for m in session.path()] == [("Once upon a time", False)]


def test_a_message_of_another_session_is_refused(sessions):
    other = sessions.new({}).add("user", "mine")
    with pytest.raises(UsageError, match="has no message"):
        sessions.new({}).go_to(other.id)


def test_two_windows_on_one_session_agree(sessions, tmp_path):
    session = sessions.new({})
    window = Sessions(tmp_path / "sessions.sqlite").find(session.id)

    def write(opened: Session) -> None:
        for _ in range(20):
            opened.add("user", "x")

    threads = [threading.Thread(target=write, args=[opened]) for opened in (session, window)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(session.tree()) == len(window.tree()) == 40


def test_kill_9_in_mid_answer_loses_nothing_that_was_shown(tmp_path):
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from calpaca.core.sessions import Sessions
        session = Sessions(Path(sys.argv[1])).new({}, "killed")
        answer = session.begin_answer()
        for number in range(10**6):
            answer.write(f"{number} ")
            print(number, end=" ", flush=True)
        """
    )
    file = tmp_path / "sessions.sqlite"
    process = subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    shown = process.stdout.read(2000)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    shown += process.stdout.read()
    process.stdout.close()
    (kept,) = Sessions(file).find("killed").path()
    assert not kept.complete
    assert kept.content.startswith(shown)


def test_a_session_is_resumed_by_its_whole_title_or_id_and_begun_where_there_is_none(sessions):
    first = sessions.resume("pets", {"app": "qa"})
    assert sessions.resume("pets", {}).id == sessions.resume(first.id, {}).id == first.id
    assert sessions.resume(first.id[:2], {}).id != first.id  # a new title that happens to begin an id
    assert first.record.setup == {"app": "qa"}


def test_messages_are_put_after_the_head_together_or_not_at_all(sessions):
    session = sessions.new({})
    session.extend([("user", "What?", {}), ("assistant", "That.", {"sources": ["a.txt"]})])
    session.extend([("user", "Why?", {}), ("assistant", "Hence.", {})])
    assert contents(session) == ["What?", "That.", "Why?", "Hence."]
    assert session.path()[1].metadata == {"sources": ["a.txt"]}
    with pytest.raises(TypeError):
        session.extend([("user", "And?", {}), ("assistant", "No.", {"not JSON": object()})])
    assert contents(session)[-1] == "Hence."
    sessions.delete(session.id)
    with pytest.raises(SessionError, match="FOREIGN KEY"):
        session.extend([("user", "Still here?", {})])


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SessionError, match="cannot be used"):
        Sessions(tmp_path / "file" / "sessions.sqlite")


def test_a_damaged_file_is_a_clear_error(tmp_path):
    file = tmp_path / "sessions.sqlite"
    file.write_bytes(b"no database at all" * 100)
    with pytest.raises(SessionError, match=r"sessions\.sqlite cannot be used"):
        Sessions(file)


def test_a_system_text_is_the_set_ups_or_the_message_that_holds_it(tmp_path):
    sessions = Sessions(tmp_path / "sessions.sqlite")
    session = sessions.new({"model": "m"})
    session.add("user", "hello")
    session.set_system("Be brief.")
    assert session.record.setup == {"model": "m", "system": "Be brief."}
    assert [message["content"] for message in session.messages()] == ["Be brief.", "hello"]
    held = sessions.new({})
    held.add("system", "Be long.")
    held.set_system("Be kind.")
    assert [message["content"] for message in held.messages()] == ["Be kind."]


def test_what_is_attached_stands_before_what_was_said(tmp_path):
    session = Sessions(tmp_path / "sessions.sqlite").new({})
    message = session.add("user", "Where?", {"attachments": [{"name": "a.txt", "text": "In the Andes."}]})
    assert message.as_message() == {"role": "user", "content": "a.txt:\n\nIn the Andes.\n\nWhere?"}


def test_only_a_session_in_which_nothing_was_said_is_discarded(tmp_path):
    sessions = Sessions(tmp_path / "sessions.sqlite")
    empty, begun = sessions.new({}), sessions.new({})
    begun.add("user", "hello")
    for session in (empty, begun):
        sessions.discard_empty(session.id)
    assert [record.id for record in sessions.records()] == [begun.id]
