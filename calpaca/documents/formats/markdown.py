"""Markdown that the loaders of structured formats write, so that headings and tables reach splitter and model alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_MARK = re.compile(r"(?m)^(?=#{1,6}\s|```|~~~|(?:=+|-{2,})\s*$)")
"""Text that Markdown would read as a heading, a fence or the line below a heading."""


def one_line(text: str) -> str:
    """The text with white space as single spaces."""
    return " ".join(text.split())


def heading(level: int, text: str) -> str:
    """A heading of level 1 to 6; nothing when the text is empty."""
    title = one_line(text)
    return f"{'#' * min(max(level, 1), 6)} {title}" if title else ""


def paragraph(text: str) -> str:
    """Text as it is, with a backslash before what would be a heading or a fence."""
    return _MARK.sub(r"\\", text.strip())


def fence(text: str) -> str:
    """Preformatted text."""
    return f"```\n{text.strip()}\n```" if text.strip() else ""


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells, the first with the names of the columns; empty rows are left out."""
    lines = [
        "| " + " | ".join(one_line(cell).replace("|", r"\|") for cell in row) + " |"
        for row in rows
        if any(cell.strip() for cell in row)
    ]
    if len(lines) > 1:
        lines.insert(1, "|" + " --- |" * (lines[0].count(" | ") + 1))
    return "\n".join(lines)


def join(parts: Iterable[str]) -> str:
    """Parts with blank lines between them."""
    return "\n\n".join(part for part in parts if part)
