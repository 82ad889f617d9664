"""EPUB books, chapter by chapter (EPUB 3.3, W3C; EPUB 2 too)."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from urllib.parse import unquote
from xml.etree import ElementTree
from zipfile import BadZipFile, ZipFile

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from calpaca.core.errors import DocumentError
from calpaca.documents.formats.archive import describe_archive
from calpaca.documents.formats.html import page_text, read_page

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_ANY = "{*}"


class EpubLoader(BaseLoader):
    """One document per part of the reading order that has text, written as Markdown.

    Metadata: `source` (path), `sha256` of the file, `page` (place in the reading order, from 1), `pages`, `title` of
    the book, `format` (`markdown`).
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def lazy_load(self) -> Iterator[Document]:
        """Raises OSError, and DocumentError when the book is damaged, protected against copying, or too large."""
        whole = describe_archive(self.path, "markdown")
        try:
            with ZipFile(self.path) as archive:
                yield from self._chapters(archive, whole)
        except (BadZipFile, KeyError, ElementTree.ParseError) as error:
            raise DocumentError(
                f"{self.path} is no EPUB book, or it is damaged: {error}.", "Check the file with an e-book reader."
            ) from error

    def _chapters(self, archive: ZipFile, metadata: dict[str, str | bool]) -> Iterator[Document]:
        package = _attribute(_xml(archive, _CONTAINER), f".//{_ANY}rootfile", "full-path")
        book = _xml(archive, package)
        hrefs = {item.get("id"): item.get("href", "") for item in book.iterfind(f".//{_ANY}manifest/{_ANY}item")}
        spine = [hrefs[item.get("idref")] for item in book.iterfind(f".//{_ANY}spine/{_ANY}itemref")]
        parts = [posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(href))) for href in spine]
        self._check_protection(archive, parts)
        title = (book.findtext(f".//{_ANY}metadata/{_ANY}title") or "").strip()
        for page, part in enumerate(parts, 1):
            text, _ = read_page(page_text(archive.read(part), f"{self.path}: {part}"))
            if text:
                place = {"page": page, "pages": len(parts), "title": title}
                yield Document(text, metadata={**metadata, **place})

    def _check_protection(self, archive: ZipFile, parts: list[str]) -> None:
        """Fonts may be scrambled in a free book; text that is has a key that a shop holds."""
        if _ENCRYPTION not in archive.namelist():
            return
        references = _xml(archive, _ENCRYPTION).iterfind(f".//{_ANY}CipherReference")
        if any(unquote(reference.get("URI", "")) in parts for reference in references):
            raise DocumentError(
                f"{self.path} is protected against copying (DRM).", "Get the book in a form without protection."
            )


def _xml(archive: ZipFile, name: str) -> ElementTree.Element:
    # expat bounds the expansion of entities since 2.4.1 and fetches nothing from outside.
    return ElementTree.fromstring(archive.read(name))  # noqa: S314


def _attribute(root: ElementTree.Element, path: str, name: str) -> str:
    element = root.find(path)
    value = None if element is None else element.get(name)
    if not value:
        raise KeyError(f"{path} has no {name}")
    return value
