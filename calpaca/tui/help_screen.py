"""The commands and the keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Markdown

if TYPE_CHECKING:
    from calpaca.tui.commands import Command

_KEYS = """\
| Key | |
| --- | --- |
| Enter | Send. Ctrl+J begins a new line. |
| Up, Down | In the first or last line: what was sent before. |
| Escape | Stop the answer; it is kept as far as it came. |
| Ctrl+R, Ctrl+E, Ctrl+Y | Answer again, edit the last question, copy the last answer. |
| Ctrl+N, Ctrl+O | A new session; all sessions, with search. |
| Ctrl+T | What the last answer about documents rests on. |
| Ctrl+P | Everything by name, and themes. |
| Tab, Shift+Tab | To the messages and back. On one: **e** edits, **r** answers again, **c** copies, **s** shows its sources, ← → walk its branches. |
| Ctrl+Q | Quit. |
"""


class HelpScreen(ModalScreen[None]):
    """What can be typed and pressed."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,f1,q", "dismiss", "Close")]

    def __init__(self, apps: Mapping[str, Command]) -> None:
        super().__init__()
        self._apps = apps

    def compose(self) -> ComposeResult:
        from calpaca.tui.commands import help_text  # the commands open this screen

        with VerticalScroll(classes="window"):
            yield Markdown(f"{_KEYS}\n\n{help_text(self._apps)}")
