"""Commands that change how the conversation goes on: model, adapters, engine, template, system text, sampling, presets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from calpaca.core.errors import UsageError
from calpaca.plugins.chat_setup import ChatSetup, save_preset
from calpaca.plugins.chat_setup import preset as preset_values
from calpaca.tui.model_slot import described

if TYPE_CHECKING:
    from calpaca.tui.app import ChatApp


def model(chat: ChatApp, name: str) -> None:
    """Go on with another model, without the adapters and template of this one; or say what is set."""
    if not name:
        _tell(chat)
        return
    chat.runtime.check(name)
    chat.change(chat.slot.setup.changed({"model": name, "adapters": [], "chat_template": None, "tokenizer": None}))


def adapter(chat: ChatApp, text: str) -> None:
    """Add an adapter after those that are there, or take it off. Raises UsageError for one that is not there."""
    adapters = list(chat.slot.setup.adapters)
    if text == "none":
        adapters = []
    elif text.startswith("-"):
        source = text[1:].strip()
        adapters = [each for each in adapters if source not in {each, each.rpartition("@")[0]}]
        if len(adapters) == len(chat.slot.setup.adapters):
            there = ", ".join(chat.slot.setup.adapters) or "there are none"
            raise UsageError(f"The model has no adapter '{source}'.", f"Its adapters: {there}.")
    else:
        adapters.append(text)
    chat.change(chat.slot.setup.changed({"adapters": adapters}))


def option(name: str) -> Callable[[ChatApp, str], None]:
    """The command that sets one option of the model."""

    def run(chat: ChatApp, text: str) -> None:
        _take(chat, chat.slot.setup.with_text(name, text))

    return run


def assign(chat: ChatApp, text: str) -> None:
    """`OPTION VALUE` sets one; nothing lists them."""
    name, _, value = text.partition(" ")
    if not text:
        _tell(chat)
        return
    if name == "system":
        raise UsageError("The system text has a command of its own.", "Write: /system TEXT")
    _take(chat, chat.slot.setup.with_text(name, value.strip() or "none"))


async def system(chat: ChatApp, text: str) -> None:
    """Change the system text; the conversation goes on under it."""
    chat.refuse_while_answering()
    chat.slot.setup = chat.slot.setup.with_text("system", text)
    chat.session.set_system(chat.slot.setup.system or "")
    await chat.show_session()


async def preset(chat: ChatApp, text: str) -> None:
    """Take a preset's values over the set-up; `save NAME` keeps the set-up as one."""
    words = text.split()
    settings = chat.runtime.settings
    if not words:
        names = ", ".join(settings.presets) or "none yet"
        chat.notify(f"{names}. /preset save NAME keeps this set-up.", title="Presets", markup=False)
    elif words[0] == "save" and len(words) == 2:
        save_preset(words[1], chat.slot.setup, settings)
        chat.notify(f"'{words[1]}' is kept in the settings.", markup=False)
    else:
        values = preset_values(text, settings)
        _take(chat, chat.slot.setup.changed(values))
        if "system" in values:
            await system(chat, str(values["system"]))


def _take(chat: ChatApp, setup: ChatSetup) -> None:
    """Go on with a set-up whose names are known. Raises what `Runtime.check` raises."""
    chat.runtime.check(setup.spec())
    chat.change(setup)


def _tell(chat: ChatApp) -> None:
    rows = [f"{name}  {value}" for name, value in described(chat.slot.setup, chat.slot.loaded).items()]
    chat.notify("\n".join(rows), title="This conversation is held with", markup=False, timeout=10)
