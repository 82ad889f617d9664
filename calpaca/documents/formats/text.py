"""Files that are text as they are: plain text, Markdown, source code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from calpaca.core.encoding import decode


class TextLoader(BaseLoader):
    """One document per text file, in whatever encoding it is.

    Metadata: `source` (path), `sha256` of the file, `encoding`, `format` (`text`, `markdown` or `code`, which
    the splitter heeds).
    """

    format = "text"

    def __init__(self, path: str) -> None:
        self.path = path

    def lazy_load(self) -> Iterator[Document]:
        """Raises OSError, and DocumentError when the file is no text."""
        data = Path(self.path).read_bytes()
        text, encoding = decode(data, self.path)
        digest = hashlib.sha256(data).hexdigest()
        metadata = {"source": self.path, "sha256": digest, "encoding": encoding, "format": self.format}
        yield Document(text, metadata=metadata)


class MarkdownLoader(TextLoader):
    """Markdown as it stands: the marks are kept, so that a passage can be found in its file."""

    format = "markdown"


class CodeLoader(TextLoader):
    """Source code and settings, which are split between lines."""

    format = "code"
