"""Rows that passed the filters, with where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from calpaca_crawl.row import Form, Row


@dataclass(frozen=True)
class KeptRow:
    """A row, its id, which is of its content, and its provenance."""

    id: str
    row: Row
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def written(self, form: Form) -> dict[str, Any]:
        """The row as its line of the output file holds it."""
        return {**self.row.written(form), "provenance": {"id": self.id, **self.provenance}}


def row_id(row: Row) -> str:
    return hashlib.sha256(f"{row.question}\0{row.answer}".encode()).hexdigest()[:16]
