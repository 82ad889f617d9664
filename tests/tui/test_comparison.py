"""One prompt to several set-ups, side by side."""

import pytest
from textual.widgets import Input, Static

from calpaca.core.errors import UsageError
from calpaca.plugins.chat_setup import ChatSetup
from calpaca.testing import fake_model
from calpaca.tui.comparison import ComparisonScreen, configurations
from calpaca.tui.differences import marked

SIZE = (100, 30)


async def test_a_prompt_is_asked_of_each_with_one_seed_and_differences_are_marked(chat, until, command):
    models = {None: fake_model(["The llama is white."]), "other": fake_model(["The llama is brown."])}
    app = chat([], temperature=1.0)
    app.slot.host.open = lambda spec: models[spec.model]
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: app.slot.loaded)
        await command(pilot, "/compare this | model=other", lambda: isinstance(app.screen, ComparisonScreen))
        await pilot.pause()
        screen = app.screen
        screen.query_one(Input).value = "What colour?"
        await pilot.press("enter")
        await until(pilot, lambda: all("tokens" in str(column.border_subtitle) for column in screen.columns))
        await until(pilot, lambda: screen.is_done)
        assert [column.text for column in screen.columns] == ["The llama is white.", "The llama is brown."]
        assert [str(column.border_title) for column in screen.columns] == ["this", "model=other"]
        assert [str(column.query_one(Static).content) for column in screen.columns] == [
            "The llama is white.",
            "The llama is brown.",
        ]
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is not screen)
        assert app.slot.loaded is models[None]
    assert app.session.path() == []


@pytest.mark.slow
async def test_an_app_stands_beside_the_model(chat, until, command, tmp_path):
    (tmp_path / "a.txt").write_text("The tower opens at nine in the morning.", encoding="utf-8")
    app = chat(lambda prompt: "The tower opens at nine in the morning." if "opens at nine" in prompt else "No idea.")
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: app.slot.loaded)
        line = f"/compare this | retrieval_qa files={tmp_path / 'a.txt'}"
        await command(pilot, line, lambda: isinstance(app.screen, ComparisonScreen))
        await pilot.pause()
        app.screen.query_one(Input).value = "When does the tower open?"
        await pilot.press("enter")
        await until(pilot, lambda: app.screen.columns[1].border_subtitle == "done")
        await until(pilot, lambda: app.screen.is_done)
        assert app.screen.columns[0].text == "No idea."
        assert "nine" in app.screen.columns[1].text


def test_set_ups_are_named_by_base_this_presets_and_options(runtime):
    runtime.settings.presets["warm"] = {"temperature": 0.9}
    setup = ChatSetup(model="m", adapters=["lora"], temperature=0.1)
    base, this, warm = (each.setup for each in configurations("base | this top_p=0.5 | warm", setup, runtime))
    assert (base.adapters, base.model) == ([], "m")
    assert (this.adapters, this.top_p) == (["lora"], 0.5)
    assert (warm.temperature, warm.adapters) == (0.9, ["lora"])
    assert [each.label for each in configurations("", setup, runtime)] == ["base", "this"]


@pytest.mark.parametrize("line", ["", "this", "this | ", "a | b | c | d", "this | nosuch", "this | temprature=1"])
def test_what_cannot_be_compared_is_told(runtime, line: str):
    with pytest.raises(UsageError):
        configurations(line, ChatSetup(), runtime)


def test_words_that_differ_are_underlined_in_both():
    texts = marked(["The llama is white.", "The llama was white.", "羊驼是白的"])
    spans = [[text.plain[span.start : span.end] for span in text.spans if span.style] for text in texts[:2]]
    assert "was" in spans[1]
    assert "is" in spans[0]
    assert "white" not in spans[1]
    assert texts[2].plain == "羊驼是白的"
