"""JSON and JSON Lines, each value after its path."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from calpaca.core.encoding import decode
from calpaca.core.errors import DocumentError
from calpaca.documents.formats.rows import leaves, record


class JsonLoader(BaseLoader):
    """One document per file. A list gives a line per element, so that line n is element n; anything else one per value.

    Metadata: `source` (path), `sha256` of the file, `encoding`, `format` (`rows`).
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def lazy_load(self) -> Iterator[Document]:
        """Raises OSError, and DocumentError when the file is no JSON."""
        data = Path(self.path).read_bytes()
        text, encoding = decode(data, self.path)
        digest = hashlib.sha256(data).hexdigest()
        metadata = {"source": self.path, "sha256": digest, "encoding": encoding, "format": "rows"}
        yield Document("\n".join(self._lines(text)), metadata=metadata)

    def _lines(self, text: str) -> Iterator[str]:
        value = self._parsed(text, 1) if text.strip() else None
        if isinstance(value, list):
            yield from map(record, value)
        else:
            yield from (f"{path}: {leaf}" if path else leaf for path, leaf in leaves(value) if leaf)

    def _parsed(self, text: str, line: int) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            place = f"line {line + error.lineno - 1}, column {error.colno}"
            raise DocumentError(f"{self.path} is no JSON: {error.msg} at {place}.", "Mend it there.") from error
        except RecursionError as error:
            raise DocumentError(f"{self.path} nests too deep to be read.", "Flatten it.") from error


class JsonLinesLoader(JsonLoader):
    """One document per file, a line per value, so that a passage's lines are those of the file.

    Where every value is a page, with `url` and `text` as crawlers write them, one document per page instead:
    its text as Markdown, its `url` as `source`, and `title` and `file` (the path) beside it.
    """

    def lazy_load(self) -> Iterator[Document]:
        data = Path(self.path).read_bytes()
        text, _ = decode(data, self.path)
        first = text.lstrip().partition("\n")[0]
        if not _is_page(self._parsed(first, 1) if first.strip() else None):
            yield from super().lazy_load()
            return
        digest = hashlib.sha256(data).hexdigest()
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield self._page(self._parsed(line, number), number, digest)

    def _page(self, value: Any, line: int, digest: str) -> Document:
        if not _is_page(value):
            raise DocumentError(f"{self.path} holds pages, but none at line {line}.", "Mend or remove that line.")
        named = {"title": value["title"]} if isinstance(value.get("title"), str) else {}
        metadata = {
            "source": value["url"],
            "file": self.path,
            "sha256": digest,
            "format": "markdown",
            "converted": True,
        }
        return Document(value["text"], metadata={**metadata, **named})

    def _lines(self, text: str) -> Iterator[str]:
        for number, line in enumerate(text.split("\n"), 1):
            yield record(self._parsed(line, number)) if line.strip() else ""


def _is_page(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("url"), str) and isinstance(value.get("text"), str)
