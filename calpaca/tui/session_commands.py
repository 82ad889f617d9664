"""Commands about sessions: begin, choose, name, copy, write and read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calpaca.core.errors import CalpacaError, UsageError
from calpaca.core.session_export import exported, imported
from calpaca.tui.dialogs import TextDialog
from calpaca.tui.session_list import SessionList

if TYPE_CHECKING:
    from calpaca.tui.app import ChatApp


async def new(chat: ChatApp, _rest: str = "") -> None:
    """Begin a session with the set-up of this one."""
    if chat.session.head is not None:
        await chat.open(chat.sessions.new(chat.slot.setup.given()))


def choose(chat: ChatApp, _rest: str = "") -> None:
    """Open the list of sessions."""

    async def opened(chosen: str | None) -> None:
        if chosen is not None and chosen != chat.session.id:
            await chat.open(chat.sessions.find(chosen))
        elif all(record.id != chat.session.id for record in chat.sessions.records()):
            await chat.open(chat.sessions.new(chat.slot.setup.given()))  # it was deleted from the list
        chat.show_top()

    chat.push_screen(SessionList(chat.sessions), opened)


async def rename(chat: ChatApp, title: str) -> None:
    """Give the session a title, asked for where there is none."""

    def named(wanted: str | None) -> None:
        if wanted is not None:
            chat.session.rename(wanted)
            chat.show_top()

    if title:
        named(title)
    else:
        chat.push_screen(TextDialog("Title", chat.session.record.title), named)


async def fork(chat: ChatApp, _rest: str = "") -> None:
    """Go on in a copy of the conversation."""
    await chat.open(chat.session.fork())


def write(chat: ChatApp, file: str) -> None:
    """Export the session to a file that is not there yet."""
    path = Path(file).expanduser()
    try:
        text = exported(chat.session, path.suffix)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", "Name another file.") from error
    chat.notify(f"Written to {path}.", markup=False)


async def read(chat: ChatApp, file: str) -> None:
    """Import sessions from a file, and open the last of them."""
    sessions = imported(chat.sessions, Path(file).expanduser())
    if not sessions:
        raise CalpacaError(f"{file} holds no session.", "Name a .json or .jsonl file of sessions.")
    chat.notify(f"{len(sessions)} sessions read.")
    await chat.open(sessions[-1])
