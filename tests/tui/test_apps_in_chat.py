"""Apps as slash commands: the form drawn from their options, the answer in the conversation, what it rests on."""

from pathlib import Path

import pytest
from textual.widgets import Input, OptionList, Static, Switch, TextArea

from calpaca.core.sessions import StoredMessage
from calpaca.plugins.options import SHARED, owner_of
from calpaca.tui.app_form import AppForm
from calpaca.tui.option_field import OptionField
from calpaca.tui.source_panel import Passage, SourcePanel, located, passages

SIZE = (100, 30)
HANDBOOK = """# Visiting

The tower opens at nine in the morning.

The present dome was opened to visitors in the year 1999.
"""


@pytest.fixture
def handbook(tmp_path) -> Path:
    file = tmp_path / "handbook.md"
    file.write_text(HANDBOOK, encoding="utf-8")
    return file


def field(app, name: str) -> OptionField:
    return next(each for each in app.screen.query(OptionField) if each.option == name)


async def test_a_question_about_a_document_is_answered_with_sources_that_open_at_their_passage(
    chat, until, command, shown, titles, handbook
):
    opened, opens = (
        "The present dome was opened to visitors in the year 1999.",
        "The tower opens at nine in the morning.",
    )
    app = chat(lambda prompt: opens if "does the tower" in prompt else opened)
    async with app.run_test(size=SIZE) as pilot:
        question = "When was the present dome opened?"
        await command(pilot, f"/retrieval_qa {question}", lambda: isinstance(app.screen, AppForm))
        await pilot.pause()
        assert field(app, "question").query_one(Input).value == question
        field(app, "files").query_one(TextArea).text = str(handbook)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: len(shown(app)) == 2 and not app.is_answering)
        assert shown(app)[0] == question
        assert "1999" in shown(app)[1]
        assert titles(app)[0] == "You · /retrieval_qa"
        assert titles(app)[1].startswith("Answer · /retrieval_qa")
        answer = app.session.path()[-1]
        assert answer.complete
        assert passages(answer)[0].source == str(handbook)
        await pilot.press("ctrl+t")
        await until(pilot, lambda: isinstance(app.screen, SourcePanel))
        document = app.screen.query_one("#document", TextArea)
        await until(pilot, lambda: "1999" in document.selected_text)
        assert document.text == HANDBOOK
        await pilot.press("escape")
        await command(pilot, "/retrieval_qa When does the tower open?", lambda: len(shown(app)) == 4)
        await until(pilot, lambda: not app.is_answering)
        assert "nine" in shown(app)[3]  # no form: it was asked as before


@pytest.mark.slow
async def test_a_form_says_what_is_wrong_and_keeps_what_was_filled_in(chat, until, command, shown):
    app = chat(["A summary."])
    async with app.run_test(size=SIZE) as pilot:
        await command(pilot, "/summarize", lambda: isinstance(app.screen, AppForm))
        await pilot.pause()
        field(app, "text").query_one(Input).value = "The llama is a camelid. It lives in the Andes."
        overlap = field(app, "chunk_overlap").query_one(Input)
        overlap.value = "-4"
        await pilot.press("ctrl+s")
        fault = app.screen.query_one(".fault", Static)
        await until(pilot, lambda: "--chunk-overlap is -4" in str(fault.content))
        overlap.value = "0"
        await pilot.press("ctrl+s")
        await until(pilot, lambda: len(shown(app)) == 2 and not app.is_answering)
        assert shown(app)[1] == "A summary."


@pytest.mark.slow
async def test_every_installed_app_has_a_command_and_a_field_for_each_option_of_its_own(chat, until, runtime):
    app = chat([])
    async with app.run_test(size=SIZE) as pilot:
        assert {*app.app_commands} == {each.name for each in runtime.apps}
        for name, command in app.app_commands.items():
            await command.run(app, "")
            await until(pilot, lambda: isinstance(app.screen, AppForm))
            await pilot.pause()
            model = runtime.apps.get(name).load_options()
            own = {each for each in model.model_fields if owner_of(model, each) not in SHARED}
            assert own <= {each.option for each in app.screen.query(OptionField)}
            assert all(each.given == {} for each in app.screen.query(OptionField))
            await pilot.press("escape")
            await until(pilot, lambda: not isinstance(app.screen, AppForm))


async def test_a_switch_and_a_choice_are_given_where_they_are_no_default(chat, until, command):
    app = chat([])
    async with app.run_test(size=SIZE) as pilot:
        await command(pilot, "/summarize", lambda: isinstance(app.screen, AppForm))
        await pilot.pause()
        field(app, "by_section").query_one(Switch).value = True
        field(app, "length").query_one("Select").value = "short"
        assert field(app, "by_section").given == {"by_section": True}
        assert field(app, "length").given == {"length": "short"}


async def test_what_fails_in_an_app_is_a_dialog_and_the_question_is_given_back(chat, until, command, tmp_path):
    app = chat([])
    async with app.run_test(size=SIZE) as pilot:
        await command(pilot, "/retrieval_qa Who?", lambda: isinstance(app.screen, AppForm))
        await pilot.pause()
        field(app, "files").query_one(TextArea).text = str(tmp_path / "nothing.txt")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: type(app.screen).__name__ == "ErrorDialog")
        await pilot.press("escape")
        assert app.composer.text == "/retrieval_qa Who?"
        assert app.session.path() == []


async def test_names_are_completed_with_tab(chat, until):
    app = chat([])
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press(*"/sum")
        await until(pilot, lambda: app.query_one("#completion").display)
        assert "/summarize" in str(app.query_one("#completion", Static).content)
        await pilot.press("tab")
        assert app.composer.text == "/summarize "
        await until(pilot, lambda: not app.query_one("#completion").display)


@pytest.mark.parametrize(
    ("text", "place"),
    [("one two\nthree", (4, 13)), ("one  two\n three", (5, 15)), ("two three two\tthree", (0, 9)), ("nothing", None)],
)
def test_a_passage_is_found_however_its_lines_are_broken(text: str, place: tuple[int, int] | None):
    assert located(text, Passage(1, "a", "", "two three")) == place


def test_passages_are_those_cited_before_those_read():
    read = {"sources": [{"source": "a.md", "text": "read", "page": None, "start": 1, "end": 2}]}
    cited = {"citations": [{"number": 3, "source": "a.md", "quote": "cited", "offsets": [4, 9]}]}
    found = [passages(StoredMessage(1, None, "assistant", "", True, each, 0.0)) for each in (read, {**read, **cited})]
    assert [(each.number, each.text, each.place) for (each,) in found] == [(1, "read", "lines 1-2"), (3, "cited", "")]


async def test_a_document_that_is_gone_is_shown_by_its_passage(chat, until, runtime, tmp_path):
    app = chat([])
    async with app.run_test(size=SIZE) as pilot:
        app.push_screen(SourcePanel([Passage(1, str(tmp_path / "gone.md"), "line 3", "its words")], runtime.loaders))
        await until(pilot, lambda: app.screen.query("#document") and app.screen.query_one("#document", TextArea).text)
        assert app.screen.query_one("#document", TextArea).text == "its words"
        assert "only the passage" in str(app.screen.query_one("#document").border_subtitle)
        assert app.screen.query_one(OptionList).option_count == 1
