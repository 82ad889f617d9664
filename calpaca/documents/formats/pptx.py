"""Slides (.pptx), one by one, with their notes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pptx
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from pptx.shapes.base import BaseShape
from pptx.shapes.group import GroupShape
from pptx.slide import Slide

from calpaca.documents.formats import markdown
from calpaca.documents.formats.archive import describe_archive


class PptxLoader(BaseLoader):
    """One document per slide, written as Markdown with its title as heading.

    Metadata: `source` (path), `sha256` of the file, `page` (number of the slide, from 1), `pages`, `format`
    (`markdown`). A slide without text, a picture perhaps, gives an empty document whose metadata says `scanned`.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def lazy_load(self) -> Iterator[Document]:
        """Raises OSError, and DocumentError when the file is damaged, locked by a password, or too large."""
        whole = describe_archive(self.path, "markdown")
        slides = pptx.Presentation(self.path).slides
        for page, slide in enumerate(slides, 1):
            text = markdown.join(_parts(slide))
            scanned = {} if text else {"scanned": True}
            yield Document(text, metadata={**whole, "page": page, "pages": len(slides), **scanned})


def _parts(slide: Slide) -> Iterator[str]:
    title = slide.shapes.title
    if title is not None:
        yield markdown.heading(1, title.text_frame.text)
    for shape in _shapes(slide.shapes):
        if title is None or shape.shape_id != title.shape_id:
            yield _text(shape)
    if slide.has_notes_slide and (notes := slide.notes_slide.notes_text_frame) is not None:
        yield markdown.paragraph(notes.text)


def _shapes(shapes: Iterable[BaseShape]) -> Iterator[BaseShape]:
    """Shapes, those within groups included."""
    for shape in shapes:
        if isinstance(shape, GroupShape):
            yield from _shapes(shape.shapes)
        else:
            yield shape


def _text(shape: BaseShape) -> str:
    if shape.has_table:
        return markdown.table([cell.text for cell in row.cells] for row in shape.table.rows)
    if shape.has_text_frame:
        return markdown.join(markdown.paragraph(each.text) for each in shape.text_frame.paragraphs)
    return ""
