"""The conversation on the screen: a view for each message, the answer in hand growing as it comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from calpaca.core.sessions import StoredMessage

_NAMES = {"user": "You", "assistant": "Answer", "system": "System text"}
_CITATION = re.compile(r"\[(\d{1,3})\](?!\()")
_CITED = "citation:"


class MessageView(Vertical, can_focus=True):
    """One message. Questions and answers can be focused, and changed from there.

    `place` is its number among its siblings, and how many there are.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "wish('edit')", "Edit"),
        Binding("r", "wish('again')", "Another answer"),
        Binding("c", "wish('copy')", "Copy"),
        Binding("s", "wish('sources')", "Sources"),
        Binding("left", "wish('earlier')", "Branch before", show=False),
        Binding("right", "wish('later')", "Branch after", show=False),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]

    class Wish(Message):
        """A person wants something done with a message."""

        def __init__(self, wish: str, message_id: int) -> None:
            super().__init__()
            self.wish = wish
            self.message_id = message_id

    class Cited(Message):
        """A person wants to see what a citation rests on."""

        def __init__(self, message: StoredMessage, number: int) -> None:
            super().__init__()
            self.message = message
            self.number = number

    def __init__(self, message: StoredMessage, place: tuple[int, int] = (1, 1)) -> None:
        super().__init__(id=f"message-{message.id}", classes=f"message {message.role}")
        self.message = message
        self.border_title = _title(message, place)

    async def settle(self, message: StoredMessage, place: tuple[int, int]) -> None:
        """The message is finished: say whose it is and whether it is complete, and link its citations."""
        self.message = message
        self.border_title = _title(message, place)
        self.border_subtitle = _sources_line(message)
        shown = self.query_one(Markdown)
        if shown.source != _linked(message):
            await shown.update(_linked(message))

    def compose(self) -> ComposeResult:
        self.border_subtitle = _sources_line(self.message)
        if self.message.role == "assistant":
            yield Markdown(_linked(self.message), open_links=False)
        else:
            yield Static(self.message.content, markup=False)

    def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        if event.href.startswith(_CITED):
            event.stop()
            self.post_message(self.Cited(self.message, int(event.href.removeprefix(_CITED))))

    def action_wish(self, wish: str) -> None:
        self.post_message(self.Wish(wish, self.message.id))


class Transcript(VerticalScroll, can_focus=False):
    """The messages from the first one to the head of the session. Keeps to its end while an answer grows."""

    def __init__(self) -> None:
        super().__init__(id="transcript")
        self._stream: MarkdownStream | None = None

    def on_mount(self) -> None:
        self.anchor()

    async def show(
        self, messages: Sequence[StoredMessage], places: dict[int, tuple[int, int]], system: str | None = None
    ) -> None:
        """Show these and nothing else; `system` is a text that stands before them and is no message."""
        await self.end_answer()
        await self.remove_children()
        if system is not None:
            await self.mount(MessageView(StoredMessage(0, None, "system", system, True, {}, 0.0)))
        await self.mount_all(MessageView(message, places.get(message.id, (1, 1))) for message in messages)
        self.anchor()

    async def add(self, message: StoredMessage) -> None:
        await self.mount(MessageView(message))
        self.anchor()

    async def grow(self, text: str, message: StoredMessage | None) -> None:
        """Add to the answer in hand; `message` is given with its first piece."""
        if self._stream is None and message is not None:
            view = MessageView(replace(message, content=""))  # what is stored of it comes piece by piece
            await self.mount(view)
            self._stream = Markdown.get_stream(view.query_one(Markdown))
        if self._stream is not None:
            await self._stream.write(text)

    @property
    def is_growing(self) -> bool:
        return self._stream is not None

    async def settle(self, message: StoredMessage, place: tuple[int, int]) -> None:
        """The last message is finished."""
        views = self.query(MessageView)
        if message.role == "assistant" and views and views.last().message.id == message.id:
            await views.last().settle(message, place)

    async def end_answer(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.stop()


def _title(message: StoredMessage, place: tuple[int, int]) -> str:
    number, of = place
    branch = f" · {number} of {of}" if of > 1 else ""
    cut = "" if message.complete or message.role != "assistant" else " · not complete"
    by = [f" · {name}" for name in (_app(message), message.metadata.get("model")) if name]
    return f"{_NAMES.get(message.role, message.role)}{''.join(by)}{branch}{cut}".replace("[", "\\[")


def _app(message: StoredMessage) -> str:
    """The app that a question was put to, or that answered it."""
    app = message.metadata.get("app")
    name = app["name"] if isinstance(app, dict) else app
    return f"/{name}" if name else ""


def _linked(message: StoredMessage) -> str:
    """The text as Markdown; where the answer has citations, their numbers are links to them."""
    if not message.metadata.get("citations"):
        return message.content
    numbers = {str(each.get("number")) for each in message.metadata["citations"]}
    return _CITATION.sub(
        lambda found: f"[\\[{found[1]}\\]]({_CITED}{found[1]})" if found[1] in numbers else found[0], message.content
    )


def _sources_line(message: StoredMessage) -> str:
    """What was attached to a question; what an answer rests on."""
    attached = [Path(each["name"]).name for each in message.metadata.get("attachments", ())]
    sources = message.metadata.get("citations") or message.metadata.get("sources") or ()
    named = list(dict.fromkeys(Path(str(each["source"])).name for each in sources))
    line = f"with {', '.join(attached)}" if attached else f"{', '.join(named)} · s or Ctrl+T shows it" if named else ""
    return line.replace("[", "\\[")
