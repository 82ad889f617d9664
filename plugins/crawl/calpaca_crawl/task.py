"""What one request asks a model for, and how its reply is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from calpaca.core.json_schema import Schema
from calpaca_crawl.reply import read_records
from calpaca_crawl.row import Row, read_row

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Draft:
    """A row that a reply holds, and what its provenance says beyond the request's."""

    row: Row
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """A record that makes no row, and why."""

    reason: str
    record: Any


@dataclass(frozen=True)
class Task:
    """One request. `schema` is what the reply must look like, None for free text; `read` makes the rows of its records.

    `details` go into the provenance of every row; `parents` are ids of the rows that the prompt shows.
    """

    method: str
    prompt: str
    schema: Schema | None
    read: Callable[[int, Record], Draft | Refused]
    details: Mapping[str, Any] = field(default_factory=dict)
    parents: Sequence[str] = ()

    def drafts(self, reply: str, *, cut: bool) -> list[Draft | Refused]:
        """The rows of a reply, and the records that make none. `cut`: the reply ends where its tokens did."""
        if self.schema is None:
            return [Refused("cut", reply) if cut else self.read(0, {"output": reply.strip()})]
        records = read_records(reply)
        if not records:
            return [Refused("no_json", reply)]
        found: list[Draft | Refused] = [self.read(place, record) for place, record in enumerate(records)]
        if cut:
            found[-1] = Refused("cut", records[-1])
        return found


def plain(_: int, record: Record) -> Draft | Refused:
    """A record that is a row already."""
    row = read_row(record)
    return Refused("incomplete", record) if row is None else Draft(row)
