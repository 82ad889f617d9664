"""Files that are put before the next question: read by the document loaders, counted by the model's tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calpaca.core.errors import DocumentError
from calpaca.core.registry import Component, Registry
from calpaca.documents.loaders import find_files, load_file

if TYPE_CHECKING:
    from calpaca.core.model import Model
    from calpaca.tui.app import ChatApp


@dataclass(frozen=True)
class Attachment:
    """A file's text. `tokens` is None where the model that would count them is not loaded."""

    name: str
    text: str
    tokens: int | None = None

    @property
    def line(self) -> str:
        """As it is shown under the composer."""
        return f"{self.name} ({self.tokens:,} tokens)" if self.tokens is not None else self.name


async def attach(chat: ChatApp, path: str) -> None:
    """Read a file, or all that is in a folder. Raises DocumentError for what cannot be read."""
    if path == "none":
        chat.attachments.clear()
    else:
        chat.attachments += await asyncio.to_thread(_read, path, chat.runtime.loaders, chat.slot.loaded)
    chat.show_attachments()


def _read(path: str, loaders: Registry[Component], model: Model | None) -> list[Attachment]:
    files = list(find_files([path], loaders))
    if not files:
        raise DocumentError(f"{path} holds no document.", "Name a file, or a folder that has some.")
    read = [(str(file), "\n\n".join(each.page_content for each in load_file(file, loaders))) for file in files]
    return [Attachment(name, text, _tokens(text, model)) for name, text in read]


def _tokens(text: str, model: Model | None) -> int | None:
    return len(model.engine.encode(text)) if model is not None else None


def summary(attachments: Sequence[Attachment]) -> str:
    """One line about all of them; with the tokens of all together where there are many."""
    if len(attachments) <= 2:
        return ", ".join(each.line for each in attachments)
    counted = [each.tokens for each in attachments if each.tokens is not None]
    tokens = f" ({sum(counted):,} tokens)" if len(counted) == len(attachments) else ""
    return f"{len(attachments)} files{tokens}"
