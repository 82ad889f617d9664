"""Word documents (.docx), with headings, lists and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator

import docx
from docx.blkcntnr import BlockItemContainer
from docx.table import Table
from docx.text.paragraph import Paragraph
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from calpaca.documents.formats import markdown
from calpaca.documents.formats.archive import describe_archive

_HEADING = re.compile(r"Heading ([1-9])$")


class DocxLoader(BaseLoader):
    """One document per file, its body written as Markdown. Headers, footers, comments and text boxes are left out.

    Metadata: `source` (path), `sha256` of the file, `format` (`markdown`), and `title` if its properties name one.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def lazy_load(self) -> Iterator[Document]:
        """Raises OSError, and DocumentError when the file is damaged, locked by a password, or too large."""
        whole = describe_archive(self.path, "markdown")
        document = docx.Document(self.path)
        title = document.core_properties.title.strip()
        named = {"title": title} if title else {}
        yield Document(markdown.join(_parts(document)), metadata={**whole, **named})


def _parts(document: docx.document.Document) -> Iterator[str]:
    for item in document.iter_inner_content():
        yield _paragraph(item) if isinstance(item, Paragraph) else markdown.table(_rows(item))


def _paragraph(paragraph: Paragraph) -> str:
    # Word keeps the English names of its built-in styles in every language.
    style = str(paragraph.style.name) if paragraph.style is not None else ""
    found = _HEADING.match(style)
    if found or style == "Title":
        return markdown.heading(int(found[1]) if found else 1, paragraph.text)
    text = markdown.paragraph(paragraph.text)
    return f"- {text}" if text and style.startswith("List") else text


def _rows(table: Table) -> Iterator[list[str]]:
    """Cells by row; a cell that spans several columns once, in the first of them."""
    for row in table.rows:
        seen: set[int] = set()
        cells: list[str] = []
        for cell in row.cells:
            cells.append("" if id(cell._tc) in seen else _cell(cell))
            seen.add(id(cell._tc))
        yield cells


def _cell(cell: BlockItemContainer) -> str:
    """Text of a cell, with that of tables within it."""
    texts = [
        item.text if isinstance(item, Paragraph) else " ".join(" ".join(row) for row in _rows(item))
        for item in cell.iter_inner_content()
    ]
    return " ".join(text for text in texts if text)
