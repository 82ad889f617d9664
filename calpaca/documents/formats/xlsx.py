"""Workbooks (.xlsx), sheet by sheet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import openpyxl
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document

from calpaca.documents.formats.archive import describe_archive
from calpaca.documents.formats.rows import named_rows


class XlsxLoader(BaseLoader):
    """One document per sheet that has cells: a line per row, with the names of the columns from the first full row.

    Of a formula the value is read that the office program saved. Metadata: `source` (path), `sha256` of the file,
    `page` (number of the sheet, from 1), `pages`, `heading` (its name), `format` (`rows`).
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def lazy_load(self) -> Iterator[Document]:
        """Raises OSError, and DocumentError when the file is damaged, locked by a password, or too large."""
        whole = describe_archive(self.path, "rows")
        with closing(openpyxl.load_workbook(self.path, read_only=True, data_only=True)) as workbook:
            sheets = workbook.worksheets
            for page, sheet in enumerate(sheets, 1):
                rows = (
                    ["" if cell is None else str(cell) for cell in row] for row in sheet.iter_rows(values_only=True)
                )
                text = "\n".join(named_rows(rows)).rstrip()
                if text:
                    yield Document(text, metadata={**whole, "page": page, "pages": len(sheets), "heading": sheet.title})
