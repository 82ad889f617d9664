"""Commands about messages: answer again, edit, copy, walk the branches, look at sources."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from textual.css.query import NoMatches

from calpaca.core.errors import UsageError
from calpaca.tui.help_screen import HelpScreen
from calpaca.tui.source_panel import SourcePanel, passages
from calpaca.tui.transcript import MessageView

if TYPE_CHECKING:
    from calpaca.core.sessions import StoredMessage
    from calpaca.tui.app import ChatApp

_CODE_BLOCK = re.compile(r"^(```+|~~~+)[^\n]*\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)


def last(chat: ChatApp, role: str) -> StoredMessage | None:
    """The last message of a role."""
    return next((message for message in reversed(chat.session.path()) if message.role == role), None)


async def again(chat: ChatApp, _rest: str = "") -> None:
    """Another answer to the last question."""
    if (question := last(chat, "user")) is not None:
        await chat.answer_again(question)


def edit(chat: ChatApp, _rest: str = "") -> None:
    """Change the last question."""
    if (question := last(chat, "user")) is not None:
        chat.edit(question)


def copy(chat: ChatApp, what: str = "") -> None:
    """Copy the last answer, or its last block of code."""
    if (answer := last(chat, "assistant")) is None:
        return
    if what and what != "code":
        raise UsageError(f"/copy knows no '{what}'.", "Write: /copy, or /copy code")
    if not what:
        copy_text(chat, answer.content)
    elif blocks := _CODE_BLOCK.findall(answer.content):
        copy_text(chat, blocks[-1][1])
    else:
        chat.notify("The answer holds no block of code.", severity="warning")


def copy_text(chat: ChatApp, text: str) -> None:
    """Put a text into the clipboard of the terminal."""
    chat.copy_to_clipboard(text)
    chat.notify("Copied.")


def sources(chat: ChatApp, _rest: str = "") -> None:
    """Show what the last answer that has sources rests on."""
    answers = [message for message in chat.session.path() if passages(message)]
    if answers:
        show_sources(chat, answers[-1])
    else:
        chat.notify("No answer here names sources. Those of apps that answer about documents do.", severity="warning")


def show_sources(chat: ChatApp, message: StoredMessage, number: int | None = None) -> None:
    """Open the panel at the passage of a number."""
    if passages(message):
        chat.push_screen(SourcePanel(passages(message), chat.runtime.loaders, number))


async def stop(chat: ChatApp, _rest: str = "") -> None:
    """End the answer in hand."""
    await chat.action_stop()


def show_help(chat: ChatApp, _rest: str = "") -> None:
    """List commands and keys."""
    chat.push_screen(HelpScreen(chat.app_commands))


async def leave(chat: ChatApp, _rest: str = "") -> None:
    """Quit."""
    await chat.action_quit()


async def grant(chat: ChatApp, wish: str, message_id: int) -> None:
    """What a focused message was told."""
    path = chat.session.path()
    message = next((each for each in path if each.id == message_id), None)
    if message is None:
        return
    match wish:
        case "edit":
            chat.edit(message)
        case "copy":
            copy_text(chat, message.content)
        case "sources":
            show_sources(chat, message)
        case "again":
            await chat.answer_again(message if message.role == "user" else path[max(path.index(message) - 1, 0)])
        case "earlier":
            await _walk(chat, message, -1)
        case "later":
            await _walk(chat, message, +1)


async def _walk(chat: ChatApp, message: StoredMessage, step: int) -> None:
    """Show the branch beside a message's."""
    siblings = [each.id for each in chat.session.siblings(message.id)]
    place = siblings.index(message.id) + step
    if chat.is_answering or not 0 <= place < len(siblings):
        return
    chat.session.walk_to(siblings[place])
    await chat.show_session()
    try:
        chat.query_one(f"#message-{siblings[place]}", MessageView).focus()
    except NoMatches:
        chat.composer.focus()
