"""Tables as text: CSV and TSV."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from calpaca.core.encoding import decode
from calpaca.core.errors import DocumentError
from calpaca.documents.formats.rows import named_rows

_SAMPLE = 65536
_LONGEST_CELL = 1 << 27


class CsvLoader(BaseLoader):
    """One document per file: a line per row, with the names of the columns that the first row gives.

    The delimiter is found out. Metadata: `source` (path), `sha256` of the file, `encoding`, `format` (`rows`).
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def lazy_load(self) -> Iterator[Document]:
        """Raises OSError, and DocumentError when the file is no text or no table."""
        data = Path(self.path).read_bytes()
        text, encoding = decode(data, self.path)
        csv.field_size_limit(_LONGEST_CELL)
        try:
            lines = list(named_rows(csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))))
        except csv.Error as error:
            raise DocumentError(f"{self.path} is no table: {error}.", "Check its quotation marks.") from error
        digest = hashlib.sha256(data).hexdigest()
        metadata = {"source": self.path, "sha256": digest, "encoding": encoding, "format": "rows"}
        yield Document("\n".join(lines), metadata=metadata)


def _delimiter(text: str) -> str:
    try:
        return csv.Sniffer().sniff(text[:_SAMPLE], delimiters=",;\t|").delimiter
    except csv.Error:  # one column
        return ","
