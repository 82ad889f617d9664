"""The chat on the screen, driven as a person drives it; the engine is the test kit's."""

from threading import Event

import pytest
from textual.widgets import Input, OptionList, Static

from calpaca.core.errors import ModelError
from calpaca.testing import fake_model
from calpaca.tui.composer import Composer
from calpaca.tui.dialogs import ErrorDialog
from calpaca.tui.transcript import MessageView

SIZE = (80, 24)


async def test_a_question_is_answered_and_kept(chat, until, shown, titles):
    app = chat(["A **camelid**."])
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press(*"Hi", "ctrl+j", *"you", "enter")
        await until(pilot, lambda: len(shown(app)) == 2 and not app.is_answering)
        assert shown(app) == ["Hi\nyou", "A **camelid**."]
        assert titles(app) == ["You", "Answer · fake"]
        assert "14 tokens · first after" in str(app.status.content)
        assert "of 32,768 tokens" in str(app.status.content)
        assert app.composer.text == ""
    assert [message.content for message in app.session.path()] == ["Hi\nyou", "A **camelid**."]


async def test_one_can_write_and_ask_before_the_model_is_there(chat, until, shown):
    model, there = fake_model(["at last"]), Event()

    def load():
        there.wait(10)
        return model

    app = chat(load=load)
    async with app.run_test(size=SIZE) as pilot:
        assert "Loading the model" in str(app.status.content)
        app.composer.text = "early"
        await pilot.press("enter")
        await pilot.pause()
        assert shown(app) == ["early"]
        there.set()
        await until(pilot, lambda: len(shown(app)) == 2)
        await until(pilot, lambda: not app.is_answering)
        assert shown(app) == ["early", "at last"]


async def test_a_model_that_cannot_be_loaded_is_a_dialog_and_the_question_is_given_back(chat, until, ask, shown):
    loads = iter([ModelError("No such model.", "Name another."), fake_model(["there"])])

    def load():
        model = next(loads)
        if isinstance(model, ModelError):
            raise model
        return model

    app = chat(load=load)
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: isinstance(app.screen, ErrorDialog))
        assert "Name another." in str(app.screen.query_one(".hint", Static).content)
        await pilot.press("escape")
        await ask(pilot, "again?")
        assert shown(app) == ["again?", "there"]


async def test_escape_stops_an_answer_and_what_was_shown_is_kept(chat, until, shown, titles):
    app = chat(["word " * 500], delay=0.005, max_new_tokens=3000)
    async with app.run_test(size=SIZE) as pilot:
        app.composer.text = "go on"
        await pilot.press("enter")
        await until(pilot, lambda: len(shown(app)) == 2 and "word word" in shown(app)[1])
        await pilot.press("escape")
        await until(pilot, lambda: not app.is_answering)
        assert titles(app)[1].endswith("not complete")
        assert app.session.path()[1].content == shown(app)[1]
        await until(pilot, lambda: app.slot.host.model.engine.running == 0)


async def test_other_screens_may_be_opened_while_an_answer_is_written(chat, until, shown):
    app = chat(["word " * 100], delay=0.005)
    async with app.run_test(size=SIZE) as pilot:
        app.composer.text = "go on"
        await pilot.press("enter")
        await until(pilot, lambda: len(shown(app)) == 2)
        await pilot.press("ctrl+o")
        await until(pilot, lambda: not app.is_answering)
        await pilot.press("escape")
        assert shown(app)[1].count("word") == 100


@pytest.mark.slow
async def test_leaving_in_mid_answer_keeps_what_was_written(chat, until, shown):
    app = chat(["word " * 2000], delay=0.002, max_new_tokens=20_000)
    async with app.run_test(size=SIZE) as pilot:
        app.composer.text = "go on"
        await pilot.press("enter")
        await until(pilot, lambda: len(shown(app)) == 2)
        await pilot.press("ctrl+q")
    assert [message.complete for message in app.session.path()] == [True, False]


@pytest.mark.slow
async def test_while_an_answer_is_written_another_question_waits_in_the_composer(chat, until, shown):
    app = chat(["word " * 2000], delay=0.005, max_new_tokens=20_000)
    async with app.run_test(size=SIZE) as pilot:
        app.composer.text = "first"
        await pilot.press("enter")
        await until(pilot, lambda: len(shown(app)) == 2)
        app.composer.text = "second"
        await pilot.press("enter")
        await pilot.pause()
        assert app.composer.text == "second"
        await pilot.press("escape")
        await until(pilot, lambda: not app.is_answering)
        assert shown(app)[0] == "first"
        assert len(shown(app)) == 2


async def test_again_makes_a_second_answer_and_branches_are_walked(chat, until, ask, shown, titles):
    app = chat(["red", "blue"])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "A colour?")
        await pilot.press("ctrl+r")
        await until(pilot, lambda: shown(app)[-1] == "blue" and not app.is_answering)
        await pilot.pause()
        assert titles(app)[1] == "Answer · fake · 2 of 2"
        app.query(MessageView).last().focus()
        await pilot.press("left")
        await until(pilot, lambda: shown(app)[-1] == "red")
        assert titles(app)[1] == "Answer · fake · 1 of 2"
        await pilot.press("right")
        await until(pilot, lambda: shown(app)[-1] == "blue")


async def test_an_edited_question_is_a_branch(chat, ask, shown, titles):
    app = chat(["a monk", "a camelid"])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "What is a lama?")
        await pilot.press("ctrl+e")
        assert app.composer.text == "What is a lama?"
        assert "Editing" in str(app.composer.border_title)
        await ask(pilot, "What is a llama?")
        assert shown(app) == ["What is a llama?", "a camelid"]
        assert titles(app)[0] == "You · 2 of 2"
        assert "lama" not in app.slot.host.model.engine.prompts[-1].replace("llama", "")
        await pilot.press("ctrl+e", "escape")
        assert app.composer.text == ""


async def test_any_message_can_be_edited_from_where_it_stands(chat, ask, shown):
    app = chat(["one", "two", "three"])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "first")
        await ask(pilot, "second")
        app.query(MessageView)[1].focus()
        await pilot.press("e")
        await ask(pilot, "my own words")
        assert shown(app) == ["first", "my own words"]
        await ask(pilot, "and then?")
        assert "my own words" in app.slot.host.model.engine.prompts[-1]


async def test_an_engine_that_fails_is_a_dialog_and_the_question_is_given_back(chat, until, ask, shown):
    app = chat([ModelError("The engine crashed.", "It is started again."), "fine"])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "hello")
        assert isinstance(app.screen, ErrorDialog)
        await pilot.press("enter")
        assert (shown(app), app.composer.text) == ([], "hello")
        await pilot.press("enter")
        await until(pilot, lambda: shown(app) == ["hello", "fine"])


async def test_sessions_are_searched_opened_renamed_and_deleted(chat, sessions, until, ask, shown):
    old = sessions.new({})
    old.add("user", "羊驼住在哪里？")
    old.add("assistant", "安第斯山脉。")
    app = chat(["fine"])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "hello")
        await pilot.press("ctrl+o")
        await pilot.pause()
        assert app.screen.query_one(OptionList).option_count == 2
        app.screen.query_one(Input).value = "安第斯"
        await until(pilot, lambda: app.screen.query_one(OptionList).option_count == 1)
        await pilot.press("f2")
        await until(pilot, lambda: type(app.screen).__name__ == "TextDialog")
        app.screen.query_one(Input).value = "Alpacas"
        await pilot.press("enter")
        await until(pilot, lambda: old.record.title == "Alpacas")
        app.screen.query_one(OptionList).focus()
        await pilot.press("enter")
        await until(pilot, lambda: app.session.id == old.id)
        assert shown(app) == ["羊驼住在哪里？", "安第斯山脉。"]
        await pilot.press("ctrl+o")
        await pilot.pause()
        app.screen.query_one(OptionList).focus()
        await pilot.press("delete")
        await until(pilot, lambda: type(app.screen).__name__ == "ConfirmDialog")
        await pilot.press("y")
        await until(pilot, lambda: len(sessions.records()) == 1)


async def test_a_new_session_begins_with_an_empty_screen_and_may_have_a_system_text(chat, sessions, until, ask, shown):
    app = chat(["fine"])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "hello")
        await pilot.press("ctrl+n")
        await until(pilot, lambda: shown(app) == [])
        app.composer.text = "/system Be brief."
        await pilot.press("enter")
        await until(pilot, lambda: shown(app) == ["Be brief."])
        await ask(pilot, "hello")
        assert app.slot.host.model.engine.prompts[-1].startswith("<|im_start|>system\nBe brief.")
    assert len(sessions.records()) == 2


@pytest.mark.slow
async def test_slash_commands_export_import_rename_and_fork(chat, tmp_path, sessions, ask, command, shown):
    app = chat(["A camelid."])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "What is a llama?")

        file = tmp_path / "talk.json"
        await command(pilot, f"/export {file}", file.exists)
        await command(pilot, "/rename Camelids", lambda: app.session.record.title == "Camelids")
        first = app.session.id
        await command(pilot, "/fork", lambda: app.session.record.title == "Camelids (fork)")
        await command(pilot, f"/import {file}", lambda: len(sessions.records()) == 3)
        assert app.session.id != first
        assert shown(app) == ["What is a llama?", "A camelid."]
        await command(pilot, f"/export {file}", lambda: isinstance(app.screen, ErrorDialog))
        await pilot.press("escape")
        await command(pilot, "/exprot x", lambda: len(app._notifications) > 0)
        assert app.composer.text == "/exprot x"
        await command(pilot, "//etc/hosts is a file", lambda: shown(app)[-2:] == ["/etc/hosts is a file", "A camelid."])


async def test_up_calls_up_what_was_sent_before(chat, ask):
    app = chat(["fine"])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "first")
        await ask(pilot, "second")
        await pilot.press("up")
        assert app.composer.text == "second"
        await pilot.press("up")
        assert app.composer.text == "first"
        await pilot.press("down", "down")
        assert app.composer.text == ""


async def test_a_long_answer_leaves_the_screen_responsive(chat, until, shown):
    app = chat(["word " * 1000], delay=0.0, max_new_tokens=30_000)
    async with app.run_test(size=SIZE) as pilot:
        app.composer.text = "go on"
        await pilot.press("enter")
        await until(pilot, lambda: len(shown(app)) == 2)
        await pilot.press(*"typed")
        assert app.query_one(Composer).text == "typed"
        await pilot.press("escape")
        await until(pilot, lambda: not app.is_answering)


async def test_old_turns_that_were_left_out_are_told(chat, ask):
    app = chat(["fine"], context_length=200, max_new_tokens=10)
    async with app.run_test(size=SIZE) as pilot:
        for number in range(4):
            await ask(pilot, f"question {number}")
        assert "messages left out" in str(app.status.content)
    assert len(app.session.path()) == 8
