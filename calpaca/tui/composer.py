"""Where a question is written: several lines, Enter sends."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.events import Key
from textual.message import Message
from textual.widgets import TextArea

from calpaca.tui.completion import Completion


class Composer(TextArea):
    """A text area that sends on Enter. Up and Down at its edges call up what was sent before."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+j,shift+enter", "newline", "New line", show=False),
    ]

    class Sent(Message):
        """A text was sent."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self) -> None:
        super().__init__(id="composer", highlight_cursor_line=False, placeholder="Ask something. /help lists commands.")
        self._sent: list[str] = []
        self._at = 0

    def write(self, text: str) -> None:
        """Put a text there to go on with."""
        self.text = text
        self.move_cursor(self.document.end)

    def remember(self, texts: list[str]) -> None:
        """What Up calls up: the questions of the session so far."""
        self._sent = list(texts)
        self._at = len(self._sent)

    def action_newline(self) -> None:
        self.insert("\n")

    async def _on_key(self, event: Key) -> None:
        if event.key == "enter":
            event.prevent_default()
            event.stop()
            self._send()
            return
        if event.key == "tab" and self.app.query_one(Completion).complete(self):
            event.prevent_default()
            event.stop()
            return
        if event.key == "up" and self.cursor_at_first_line and self._recall(-1):
            event.prevent_default()
            return
        if event.key == "down" and self.cursor_at_last_line and self._recall(+1):
            event.prevent_default()
            return
        await super()._on_key(event)

    def _send(self) -> None:
        text = self.text.strip()
        if text:
            self.post_message(self.Sent(text))

    def accept(self, text: str) -> None:
        """Empty the composer: its text was taken."""
        self.clear()
        self.remember([*self._sent, text])

    def _recall(self, step: int) -> bool:
        """Call up the text before or after; what is being written is not replaced by it."""
        shown = self._sent[self._at] if self._at < len(self._sent) else ""
        if self.text != shown or not 0 <= self._at + step <= len(self._sent):
            return False
        self._at += step
        self.write(self._sent[self._at] if self._at < len(self._sent) else "")
        return True
