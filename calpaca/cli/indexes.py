"""`calpaca indexes`: the indexes of documents that lie in the cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click

from calpaca.cli.group import Group
from calpaca.cli.table import table

if TYPE_CHECKING:
    from calpaca.documents.shelf import ShelvedIndex


@click.group(cls=Group)
def indexes() -> None:
    """List and remove indexes of documents."""


@indexes.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_indexes(as_json: bool) -> None:
    """List what each index holds, with which embedding model, and what it takes on disk."""
    from calpaca.documents import shelf

    found = list(shelf.indexes())
    if as_json:
        click.echo(json.dumps([_as_json(index) for index in found], ensure_ascii=False, indent=2))
    elif found:
        rows = [
            (
                index.id,
                index.description.embedder or "?",
                f"{index.bytes / 1e6:,.1f} MB",
                _time(index.changed),
                _subject(index),
            )
            for index in found
        ]
        click.echo(table(("ID", "EMBEDDING", "SIZE", "CHANGED", "DOCUMENTS"), rows))
    else:
        click.echo("No indexes yet.", err=True)


@indexes.command()
@click.argument("index_id")
def remove(index_id: str) -> None:
    """Remove an index; the documents stay, and it can be made again. A unique beginning of the id is enough."""
    from calpaca.documents import shelf

    click.echo(f"Removed {shelf.remove(index_id)}", err=True)


def _subject(index: ShelvedIndex) -> str:
    described = index.description
    if not described.format:
        return "made by another version of calpaca"
    name = f"{described.collection}: " if described.collection else ""
    return name + ", ".join(described.paths)


def _as_json(index: ShelvedIndex) -> dict[str, object]:
    return {"id": index.id, "folder": str(index.folder), "bytes": index.bytes, **asdict(index.description)}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")  # local time, as a person reads it
