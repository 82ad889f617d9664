"""Installed apps as commands: a form where there is something to say, the answer and its sources into the conversation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from calpaca.core.errors import UsageError
from calpaca.plugins.app_run import AppRun, read_run, shared_values
from calpaca.plugins.app_turn import AppTurn
from calpaca.plugins.instances import find_instance
from calpaca.tui.app_form import AppForm

if TYPE_CHECKING:
    from calpaca.core.model import Model
    from calpaca.core.sessions import Session, StoredMessage
    from calpaca.tui.app import ChatApp


def runner(name: str) -> Callable[[ChatApp, str], Awaitable[None]]:
    """The command of an app. With a text it is asked as it was last asked in this session; else its form is shown."""

    async def run(chat: ChatApp, text: str) -> None:
        chat.refuse_while_answering()
        instance = find_instance(name, chat.runtime)
        known = _last_options(chat.session, name)
        if text and known is not None:
            await _ask(chat, AppRun(name, known, text))
            return
        model = instance.app.load_options()
        shared = shared_values(chat.slot.setup, model)

        def check(run: AppRun) -> None:
            read_run(instance, AppRun(name, {**shared, **run.options}, run.input))
            missing = instance.app.input if not run.input and instance.app.documents is None else None
            if missing and instance.app.kind == "answer":
                raise UsageError(f"There is no {missing} yet.", "Write it into the first field.")

        async def filled(run: AppRun | None) -> None:
            if run is not None:
                await _ask(chat, run)

        shown = {**(known or {}), **({instance.app.input: text} if instance.app.input and text else {})}
        chat.push_screen(AppForm(instance, shown, check), filled)

    return run


async def _ask(chat: ChatApp, run: AppRun) -> None:
    """Put the question into the conversation, with how it is to be answered."""
    await chat.say(
        run.input or "(the documents)", {"app": {"name": run.name, "options": dict(run.options), "input": run.input}}
    )


def turn(chat: ChatApp, question: StoredMessage, model: Model) -> AppTurn:
    """The answer of the app that a question was put to."""
    asked = question.metadata["app"]
    app = find_instance(asked["name"], chat.runtime).app
    options = {**shared_values(chat.slot.setup, app.load_options()), **asked["options"]}
    text = question.content if asked["input"] else ""
    before = [each for each in chat.session.path() if each.id != question.id and each.role in {"user", "assistant"}]
    history = tuple({"role": each.role, "content": each.content} for each in before)
    run = AppRun(asked["name"], options, text, history)
    return AppTurn(chat.session, asked["name"], app.answer, lambda: chat.slot.host.run(model, run))


def _last_options(session: Session, name: str) -> dict[str, Any] | None:
    """How the app was last asked here."""
    for message in reversed(session.path()):
        asked = message.metadata.get("app")
        if message.role == "user" and asked and asked["name"] == name:
            return dict(asked["options"])
    return None
