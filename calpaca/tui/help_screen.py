"""The commands and the keys."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Markdown

from calpaca.tui.commands import help_text

_KEYS = """\
| Key | |
| --- | --- |
| Enter | Send. Ctrl+J begins a new line. |
| Up, Down | In the first or last line: what was sent before. |
| Escape | Stop the answer; it is kept as far as it came. |
| Ctrl+R, Ctrl+E, Ctrl+Y | Answer again, edit the last question, copy the last answer. |
| Ctrl+N, Ctrl+O | A new session; all sessions, with search. |
| Ctrl+P | Everything by name, and themes. |
| Tab, Shift+Tab | To the messages and back. On one: **e** edits, **r** answers again, **c** copies, ← → walk its branches. |
| Ctrl+Q | Quit. |
"""


class HelpScreen(ModalScreen[None]):
    """What can be typed and pressed."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,f1,q", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="window"):
            yield Markdown(f"{_KEYS}\n\n{help_text()}")
