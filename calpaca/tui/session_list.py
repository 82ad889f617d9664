"""The list of sessions, searched in their full text while one types."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, OptionList
from textual.widgets.option_list import Option

from calpaca.core.sessions import Found, SessionRecord, Sessions
from calpaca.tui.dialogs import ConfirmDialog, TextDialog

_EXCERPT = 70


class SessionList(ModalScreen[str | None]):
    """Gives the id of the session that was chosen, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "Back"),
        Binding("f2", "rename", "Rename"),
        Binding("delete", "delete", "Delete"),
        Binding("down", "app.focus_next", show=False),
    ]

    def __init__(self, sessions: Sessions) -> None:
        super().__init__()
        self._sessions = sessions

    def compose(self) -> ComposeResult:
        with Vertical(classes="window"):
            yield Input(placeholder="Search all sessions")
            yield OptionList()
        yield Footer()

    def on_mount(self) -> None:
        self._list("")

    def on_input_changed(self, event: Input.Changed) -> None:
        self._list(event.value)

    def on_input_submitted(self) -> None:
        self.query_one(OptionList).focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._chosen(event.option))

    def _list(self, text: str) -> None:
        options = self.query_one(OptionList)
        options.clear_options()
        if text.strip():
            rows = [(found.session, _found(found, text)) for found in self._sessions.search(text)]
        else:
            rows = [(record, _listed(record)) for record in self._sessions.records() if record.messages]
        # One session may hold several messages that were found, and option ids are unique.
        options.add_options(Option(line, id=f"{record.id} {place}") for place, (record, line) in enumerate(rows))
        if not rows:
            options.add_option(Option("Nothing found." if text.strip() else "No sessions yet.", disabled=True))
        else:
            options.highlighted = 0

    def _highlighted(self) -> str | None:
        options = self.query_one(OptionList)
        if options.highlighted is None or options.option_count == 0:
            return None
        return self._chosen(options.get_option_at_index(options.highlighted))

    @staticmethod
    def _chosen(option: Option) -> str | None:
        return option.id.partition(" ")[0] if option.id else None

    @work
    async def action_rename(self) -> None:
        if (session_id := self._highlighted()) is None:
            return
        session = self._sessions.find(session_id)
        title = await self.app.push_screen_wait(TextDialog("Title", session.record.title))
        if title is not None:
            session.rename(title)
            self._list(self.query_one(Input).value)

    @work
    async def action_delete(self) -> None:
        if (session_id := self._highlighted()) is None:
            return
        title = self._sessions.find(session_id).record.title
        if await self.app.push_screen_wait(ConfirmDialog(f"Delete '{title}' and all its messages?")):
            self._sessions.delete(session_id)
            self._list(self.query_one(Input).value)


def _listed(record: SessionRecord) -> Text:
    when = datetime.fromtimestamp(record.updated).strftime("%Y-%m-%d %H:%M")  # local time, as a person reads it
    return Text.assemble((f"{when}  ", "dim"), record.title or "(no title)", (f"  {record.messages} messages", "dim"))


def _found(found: Found, text: str) -> Text:
    """The title, and the place in the message that holds the first word looked for."""
    content = " ".join(found.message.content.split())
    at = content.casefold().find(text.split(maxsplit=1)[0].casefold())
    start = max(at - _EXCERPT // 3, 0)
    excerpt = content[start : start + _EXCERPT]
    line = Text.assemble(found.session.title or "(no title)", ("  …" if start else "  ", "dim"), (excerpt, "italic"))
    line.highlight_words(text.split(), "reverse", case_sensitive=False)
    return line
