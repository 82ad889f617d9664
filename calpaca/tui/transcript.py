"""The conversation on the screen: a view for each message, the answer in hand growing as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from calpaca.core.sessions import StoredMessage

_NAMES = {"user": "You", "assistant": "Answer", "system": "System text"}


class MessageView(Vertical, can_focus=True):
    """One message. Questions and answers can be focused, and changed from there.

    `place` is its number among its siblings, and how many there are.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "wish('edit')", "Edit"),
        Binding("r", "wish('again')", "Another answer"),
        Binding("c", "wish('copy')", "Copy"),
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

    def __init__(self, message: StoredMessage, place: tuple[int, int] = (1, 1)) -> None:
        super().__init__(id=f"message-{message.id}", classes=f"message {message.role}")
        self.message = message
        self.border_title = _title(message, place)

    def settle(self, message: StoredMessage, place: tuple[int, int]) -> None:
        """The message is finished: say whose it is and whether it is complete."""
        self.message = message
        self.border_title = _title(message, place)

    def compose(self) -> ComposeResult:
        if self.message.role == "assistant":
            yield Markdown(self.message.content, open_links=False)
        else:
            yield Static(self.message.content, markup=False)

    def action_wish(self, wish: str) -> None:
        self.post_message(self.Wish(wish, self.message.id))


class Transcript(VerticalScroll, can_focus=False):
    """The messages from the first one to the head of the session. Keeps to its end while an answer grows."""

    def __init__(self) -> None:
        super().__init__(id="transcript")
        self._stream: MarkdownStream | None = None

    def on_mount(self) -> None:
        self.anchor()

    async def show(self, messages: Sequence[StoredMessage], places: dict[int, tuple[int, int]]) -> None:
        """Show these and nothing else."""
        await self.end_answer()
        await self.remove_children()
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

    def settle(self, message: StoredMessage, place: tuple[int, int]) -> None:
        """The last message is finished."""
        views = self.query(MessageView)
        if views and views.last().message.id == message.id:
            views.last().settle(message, place)

    async def end_answer(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.stop()


def _title(message: StoredMessage, place: tuple[int, int]) -> str:
    number, of = place
    branch = f" · {number} of {of}" if of > 1 else ""
    model = message.metadata.get("model")
    name = f"{_NAMES.get(message.role, message.role)}{f' · {model}' if model else ''}"
    cut = "" if message.complete or message.role != "assistant" else " · not complete"
    return f"{name}{branch}{cut}".replace("[", "\\[")
