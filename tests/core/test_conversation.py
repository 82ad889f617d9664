"""A session and the model that answers it."""

import pytest

from calpaca.core.conversation import Conversation
from calpaca.core.engine import Sampling
from calpaca.core.errors import ContextOverflowError, ModelError
from calpaca.core.events import ContextReport, Notice, Result, Token
from calpaca.core.sessions import Sessions
from calpaca.testing import fake_model


@pytest.fixture
def session(tmp_path):
    return Sessions(tmp_path / "sessions.sqlite").new({})


def said(session) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in session.path()]


def test_an_answer_is_streamed_and_kept_with_what_it_took(session):
    session.add("system", "Be brief.")
    conversation = Conversation(session, fake_model(["A camelid."]), Sampling())
    events = list(conversation.ask("What is a llama?"))
    assert "".join(event.text for event in events if isinstance(event, Token)) == "A camelid."
    assert said(session) == [("system", "Be brief."), ("user", "What is a llama?"), ("assistant", "A camelid.")]
    kept = session.path()[-1]
    assert kept.complete
    assert kept.metadata["model"] == "fake"
    assert kept.metadata["usage"]["completion_tokens"] > 0
    assert isinstance(events[-1], Result)
    assert events[-1].value["context"]["sent_tokens"] == events[-1].value["usage"]["prompt_tokens"]


def test_the_model_is_shown_the_branch_that_the_session_stands_at(session):
    model = fake_model(["one", "two", "three"])
    conversation = Conversation(session, model, Sampling())
    list(conversation.ask("first"))
    session.edit(session.path()[0].id, "changed")
    list(conversation.answer())
    list(conversation.ask("next"))
    assert "first" not in model.engine.prompts[-1]
    assert [content for _, content in said(session)] == ["changed", "two", "next", "three"]


def test_each_question_can_stand_alone_after_the_system_text(session):
    session.add("system", "Be brief.")
    model = fake_model(["fine"])
    conversation = Conversation(session, model, Sampling())
    for question in ("first", "second"):
        conversation.begin_anew()
        list(conversation.ask(question))
    assert "first" not in model.engine.prompts[1]
    assert "Be brief." in model.engine.prompts[1]
    assert len(session.tree()) == 5


def test_leaving_an_answer_stops_it_and_keeps_what_was_shown(session):
    model = fake_model(["word " * 500], delay=0.002)
    events = Conversation(session, model, Sampling(max_new_tokens=5000)).ask("Go on.")
    shown = "".join(event.text for event, _ in zip(events, range(5), strict=False) if isinstance(event, Token))
    events.close()
    answer = session.path()[-1]
    assert not answer.complete
    assert answer.content.startswith(shown)
    assert answer.content.strip()


def test_an_answer_cut_at_its_longest_length_is_told(session):
    events = list(Conversation(session, fake_model(["word " * 50]), Sampling(max_new_tokens=10)).ask("Go on."))
    assert any(isinstance(event, Notice) and "cut at 10 tokens" in event.text for event in events)
    assert not session.path()[-1].complete


def test_old_turns_without_room_are_left_out_and_counted(session):
    conversation = Conversation(session, fake_model(["fine"], context_length=200), Sampling(max_new_tokens=10))
    for number in range(4):
        events = list(conversation.ask(f"question {number}"))
    (use,) = [event.use for event in events if isinstance(event, ContextReport)]
    assert use.dropped > 0
    assert len(session.path()) == 8


def test_a_question_that_cannot_be_answered_leaves_the_conversation_as_it_was(session):
    conversation = Conversation(session, fake_model(["fine"], context_length=200), Sampling(max_new_tokens=10))
    list(conversation.ask("hello"))
    before = said(session)
    with pytest.raises(ContextOverflowError):
        list(conversation.ask("x" * 300))
    assert said(session) == before


def test_an_engine_that_fails_before_the_first_word_leaves_the_conversation_as_it_was(session):
    conversation = Conversation(session, fake_model([ModelError("It crashed."), "fine"]), Sampling())
    with pytest.raises(ModelError, match="It crashed"):
        list(conversation.ask("hello"))
    assert said(session) == []
    list(conversation.ask("hello"))
    assert said(session) == [("user", "hello"), ("assistant", "fine")]
