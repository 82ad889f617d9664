"""Model, adapters, sampling, system text, presets and attachments, changed while a conversation goes on."""

import pytest

from calpaca.core.errors import ModelError
from calpaca.core.settings import read_settings
from calpaca.testing import fake_model
from calpaca.tui.dialogs import ErrorDialog

SIZE = (100, 30)


async def test_model_adapters_and_engine_change_and_the_conversation_goes_on(chat, until, ask, command, shown):
    app = chat(["one", "two"])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "first")
        await command(pilot, "/model other", lambda: app.slot.loaded and app.slot.loaded.name == "other")
        await command(
            pilot, "/adapter lora@0.5", lambda: app.slot.loaded and app.slot.loaded.name == "other + lora@0.5"
        )
        await command(pilot, "/engine transformers", lambda: app.slot.host.opened[-1].engine == "transformers")
        await until(pilot, lambda: app.slot.loaded)
        await command(pilot, "/adapter -lora", lambda: app.slot.loaded and app.slot.loaded.name == "other")
        await ask(pilot, "second")
        assert shown(app) == ["first", "one", "second", "two"]
        assert "first" in app.slot.host.model.engine.prompts[-1]
        assert app.session.record.setup == {"model": "other", "engine": "transformers"}
        assert [message.metadata.get("model") for message in app.session.path()][1::2] == ["fake", "other"]


async def test_a_model_that_cannot_be_loaded_leaves_the_one_that_was_there(chat, until, ask, command, shown):
    loads = iter([fake_model(["one"]), ModelError("Out of memory.", "Take a smaller one."), fake_model(["two"])])

    def load():
        model = next(loads)
        if isinstance(model, ModelError):
            raise model
        return model

    app = chat(load=load)
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "first")
        await command(pilot, "/model huge", lambda: isinstance(app.screen, ErrorDialog))
        await pilot.press("escape")
        await until(pilot, lambda: app.slot.loaded is not None)
        assert app.slot.setup.model is None
        await ask(pilot, "second")
        assert shown(app) == ["first", "one", "second", "two"]


@pytest.mark.slow
async def test_sampling_and_policy_are_set_and_wrong_values_are_told(chat, until, command):
    app = chat([])
    async with app.run_test(size=SIZE) as pilot:
        await command(pilot, "/set temperature 0.2", lambda: app.slot.sampling.temperature == 0.2)
        await command(pilot, "/set max-new-tokens 7", lambda: app.slot.sampling.max_new_tokens == 7)
        await command(pilot, "/set context summarise", lambda: app.slot.setup.context == "summarise")
        await command(pilot, "/set temperature none", lambda: app.slot.sampling.temperature == 0.0)
        for wrong in ("/set temperature hot", "/set temprature 1", "/set temperature -3", "/adapter -lora"):
            await command(pilot, wrong, lambda: isinstance(app.screen, ErrorDialog))
            await pilot.press("escape")
            assert app.composer.text == wrong
        assert len(app.slot.host.opened) == 1


async def test_the_system_text_changes_in_the_midst_of_a_conversation(chat, ask, command, shown):
    app = chat(["one", "two"])
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "first")
        await command(pilot, "/system Be brief.", lambda: shown(app) == ["Be brief.", "first", "one"])
        await ask(pilot, "second")
        assert app.slot.host.model.engine.prompts[-1].startswith("<|im_start|>system\nBe brief.")
        assert shown(app) == ["Be brief.", "first", "one", "second", "two"]
    assert app.session.messages()[0] == {"role": "system", "content": "Be brief."}


@pytest.mark.slow
async def test_a_preset_is_saved_from_the_chat_and_taken_in_another(chat, command):
    first = chat([], temperature=0.7, stop=["END\n"], model="other")
    async with first.run_test(size=SIZE) as pilot:
        await command(pilot, "/preset save mine", lambda: "mine" in first.runtime.settings.presets)
        await command(pilot, "/preset save mine", lambda: isinstance(first.screen, ErrorDialog))
    assert read_settings().presets == {"mine": {"model": "other", "temperature": 0.7, "stop": ["END\n"]}}
    second = chat([])
    async with second.run_test(size=SIZE) as pilot:
        await command(pilot, "/preset mine", lambda: second.slot.sampling.temperature == 0.7)
        assert second.slot.sampling.stop == ("END\n",)
        await command(pilot, "/preset yours", lambda: isinstance(second.screen, ErrorDialog))


@pytest.mark.parametrize("attached", ["a.txt", "."])
async def test_files_are_attached_with_their_tokens_and_stand_before_the_question(
    chat, until, ask, command, shown, tmp_path, attached
):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("Llamas live in the Andes.", encoding="utf-8")
    app = chat(["In the Andes.", "again"])
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, lambda: app.slot.loaded)
        await command(pilot, f"/attach {folder / attached}", lambda: "a.txt (" in str(app.composer.border_subtitle))
        assert "tokens)" in str(app.composer.border_subtitle)
        await ask(pilot, "Where?")
        assert shown(app) == ["Where?", "In the Andes."]
        prompt = app.slot.host.model.engine.prompts[-1]
        assert prompt.index("Llamas live in the Andes.") < prompt.index("Where?")
        assert app.composer.border_subtitle == ""
        await pilot.press("ctrl+e")
        await ask(pilot, "Where exactly?")
        assert "Llamas live in the Andes." in app.slot.host.model.engine.prompts[-1]
        await command(pilot, "/attach nothing.txt", lambda: isinstance(app.screen, ErrorDialog))


@pytest.mark.slow
async def test_what_is_attached_and_too_long_is_told_with_numbers_and_stays_attached(chat, ask, command, tmp_path):
    (tmp_path / "long.txt").write_text("long " * 500, encoding="utf-8")
    app = chat([], context_length=200)
    async with app.run_test(size=SIZE) as pilot:
        await command(pilot, f"/attach {tmp_path / 'long.txt'}", lambda: app.attachments)
        await ask(pilot, "What?")
        assert isinstance(app.screen, ErrorDialog)
        await pilot.press("escape")
        assert (app.composer.text, len(app.attachments)) == ("What?", 1)


async def test_the_status_tells_context_policy_speed_and_memory(chat, until, ask):
    app = chat(["word " * 5], delay=0.005)
    async with app.run_test(size=SIZE) as pilot:
        await ask(pilot, "What?")
        await until(pilot, lambda: "GB" in str(app.status.content))
        for told in ("first after", "of 32,768 tokens", ", drop", "1.2 GB"):
            assert told in str(app.status.content)


async def test_sessions_in_which_nothing_was_said_do_not_stay(chat, ask, sessions, until):
    kept = sessions.new({})
    kept.add("user", "hello")
    app = chat([])
    async with app.run_test(size=SIZE) as pilot:
        await app.open(sessions.find(kept.id))
        await app.open(sessions.new({}))
        assert len(sessions.records()) == 2
        await pilot.press("ctrl+q")
    assert [record.id for record in sessions.records()] == [kept.id]
