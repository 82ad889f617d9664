"""What an answer about documents rests on: its citations, and the passage of each marked in its document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Footer, OptionList, TextArea
from textual.widgets.option_list import Option
from textual.widgets.text_area import Selection

from calpaca.core.errors import CalpacaError
from calpaca.core.events import Source
from calpaca.core.registry import Component, Registry
from calpaca.core.sessions import StoredMessage
from calpaca.documents.loaders import load_file


@dataclass(frozen=True)
class Passage:
    """Words of a document. `offsets` are its characters there, where the answer tells them."""

    number: int
    source: str
    place: str
    text: str
    page: int | None = None
    offsets: tuple[int, int] | None = None


def passages(message: StoredMessage) -> list[Passage]:
    """The citations of an answer; of one without, the passages that its app read."""
    found: Sequence[Mapping[str, Any]] = message.metadata.get("citations") or message.metadata.get("sources") or ()
    return [_passage(number, each) for number, each in enumerate(found, 1)]


def _passage(place: int, found: Mapping[str, Any]) -> Passage:
    text = str(found.get("quote") or found.get("text") or "")
    source = Source(
        str(found["source"]), text, found.get("page"), found.get("start"), found.get("end"),
        metadata=dict(found.get("metadata") or {}),
    )  # fmt: skip
    offsets = found.get("offsets")
    first, last = offsets if offsets else (None, None)
    given = (int(first), int(last)) if first is not None and last is not None else None
    return Passage(int(found.get("number") or place), source.source, source.place, text, source.page, given)


def located(text: str, passage: Passage) -> tuple[int, int] | None:
    """Where a passage stands in a text, however its lines are broken there; None where it does not."""
    if passage.offsets and text[slice(*passage.offsets)] == passage.text:
        return passage.offsets
    words = r"\s+".join(map(re.escape, passage.text.split()))
    match = re.search(words, text) if words else None
    return match.span() if match else None


class SourcePanel(ModalScreen[None]):
    """The passages on the left, the document with the chosen one marked on the right. `number` is shown first."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q", "dismiss", "Back")]

    def __init__(self, passages: Sequence[Passage], loaders: Registry[Component], number: int | None = None) -> None:
        super().__init__()
        self._passages = list(passages)
        self._loaders = loaders
        self._first = next((place for place, each in enumerate(passages) if each.number == number), 0)
        self._read: dict[str, list[tuple[int | None, str]]] = {}

    def compose(self) -> ComposeResult:
        with Vertical(classes="window"), Horizontal():
            yield OptionList(*(Option(_listed(each), id=str(place)) for place, each in enumerate(self._passages)))
            yield TextArea(read_only=True, show_line_numbers=True, id="document")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        options = self.query_one(OptionList)
        options.border_title = "Sources"
        options.highlighted = self._first
        options.focus()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        self._show(self._passages[event.option_index])

    @work(thread=True, exclusive=True)
    def _show(self, passage: Passage) -> None:
        """Read the document, which may be a large one, and find the passage in it."""
        for text in self._texts(passage):
            if (place := located(text, passage)) is not None:
                self.app.call_from_thread(self._mark, passage, text, place)
                return
        alone = (0, len(passage.text))
        self.app.call_from_thread(self._mark, passage, passage.text, alone, " · only the passage: it is not there now")

    def _texts(self, passage: Passage) -> list[str]:
        """The texts of a document in which the passage may stand."""
        if passage.source not in self._read:
            try:
                documents = load_file(Path(passage.source), self._loaders)
            except (CalpacaError, OSError):
                documents = []  # it was moved or changed since; the passage itself is kept
            self._read[passage.source] = [(each.metadata.get("page"), each.page_content) for each in documents]
        return [text for page, text in self._read[passage.source] if passage.page in {None, page}]

    def _mark(self, passage: Passage, text: str, place: tuple[int, int], note: str = "") -> None:
        area = self.query_one("#document", TextArea)
        if area.text != text:
            area.text = text
        start, end = (_location(text, index) for index in place)
        area.selection = Selection(end, start)  # the cursor stands at the beginning, which is what is scrolled to
        area.border_title = f"{Path(passage.source).name}, {passage.place}".rstrip(", ").replace("[", "\\[")
        area.border_subtitle = f"[{passage.number}] marked{note}".replace("[", "\\[")
        area.scroll_cursor_visible(center=True)


def _location(text: str, index: int) -> tuple[int, int]:
    """Row and column of a character."""
    before = text[:index].split("\n")
    return len(before) - 1, len(before[-1])


def _listed(passage: Passage) -> str:
    words = " ".join(passage.text.split())
    return f"[{passage.number}] {Path(passage.source).name} {passage.place}\n{words[:60]}".replace("[", "\\[")
