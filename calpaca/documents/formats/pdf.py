"""PDF files, page by page, with pdfium."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pypdfium2 as pdfium
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from calpaca.core.errors import DocumentError

_PDFIUM = threading.Lock()
"""pdfium is not safe to call from two threads at once."""


class PdfLoader(BaseLoader):
    """One document per page that has text.

    Metadata: `source` (path), `sha256` of the file, `page` (from 1), `pages` of the file, `format` (`text`). A page that
    is a picture, as a scanned one is, gives an empty document whose metadata says `scanned`: its text is not read.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def lazy_load(self) -> Iterator[Document]:
        """Raises OSError, and DocumentError when the file is locked by a password, damaged, or scanned throughout."""
        data = Path(self.path).read_bytes()
        texts = self._texts(data)
        if texts and not any(text.strip() for text in texts):
            raise DocumentError(
                f"{self.path} has no text: its {len(texts)} page(s) are pictures, scanned ones perhaps.",
                "Add text with an OCR program, such as `ocrmypdf IN.pdf OUT.pdf`, and name the new file.",
            )
        whole = {"source": self.path, "sha256": hashlib.sha256(data).hexdigest(), "pages": len(texts), "format": "text"}
        for page, text in enumerate(texts, 1):
            scanned = {} if text.strip() else {"scanned": True}
            yield Document(text, metadata={**whole, "page": page, **scanned})

    def _texts(self, data: bytes) -> list[str]:
        with _PDFIUM:
            try:
                with closing(pdfium.PdfDocument(data)) as document:
                    return [_text(page) for page in document]
            except pdfium.PdfiumError as error:
                raise self._unreadable(error) from error

    def _unreadable(self, error: pdfium.PdfiumError) -> DocumentError:
        if "password" in str(error).lower():
            return DocumentError(
                f"{self.path} is locked by a password.", "Save a copy without one (`qpdf --decrypt`) and name that."
            )
        return DocumentError(f"{self.path} is no PDF, or it is damaged: {error}.", "Check the file with a PDF viewer.")


def _text(page: pdfium.PdfPage) -> str:
    with closing(page), closing(page.get_textpage()) as text:
        return str(text.get_text_bounded()).replace("\r\n", "\n")
