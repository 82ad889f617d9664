"""Word documents (.docx), with headings, lists and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

import docx
from docx.blkcntnr import BlockItemContainer
from docx.oxml import parse_xml
from docx.oxml.ns import qn
from docx.table import Table
from docx.text.paragraph import Paragraph
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from calpaca.documents.formats import markdown
from calpaca.documents.formats.archive import describe_archive

_HEADING = re.compile(r"Heading ([1-9])$")


class DocxLoader(BaseLoader):
    """One document per file, written as Markdown: its body, then its footnotes and endnotes, then what stands in headers
    and footers, each text once. Comments and text boxes are left out.

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
        parts = chain(_parts(document), _notes(document), _margins(document))
        yield Document(markdown.join(parts), metadata={**whole, **named})


def _parts(document: docx.document.Document) -> Iterator[str]:
    for item in document.iter_inner_content():
        yield _paragraph(item) if isinstance(item, Paragraph) else markdown.table(_rows(item))


def _notes(document: docx.document.Document) -> Iterator[str]:
    """Footnotes and endnotes, which python-docx does not read, with their numbers in the file."""
    for relation in document.part.rels.values():
        if relation.is_external or not relation.reltype.endswith(("/footnotes", "/endnotes")):
            continue
        notes = parse_xml(relation.target_part.blob)
        for note in notes:
            text = "\n".join("".join(each.itertext(qn("w:t"))) for each in note.iter(qn("w:p")))
            if note.get(qn("w:type")) is None and text.strip():  # the others are separators
                yield markdown.paragraph(f"[{note.get(qn('w:id'))}] {text.strip()}")


def _margins(document: docx.document.Document) -> Iterator[str]:
    """Texts of headers and footers of all sections, each once."""
    containers = (
        part
        for section in document.sections
        for part in (section.header, section.first_page_header, section.footer, section.first_page_footer)
        if not part.is_linked_to_previous
    )
    texts = (item for container in containers for item in container.iter_inner_content())
    yield from dict.fromkeys(
        _paragraph(item) if isinstance(item, Paragraph) else markdown.table(_rows(item)) for item in texts
    )


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
