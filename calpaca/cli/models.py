"""`calpaca models`: what can be used, what lies here, and fetching it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

from calpaca.cli.group import Group
from calpaca.cli.run import shared_runtime
from calpaca.cli.table import table
from calpaca.core.errors import UnsupportedError

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime
    from calpaca.core.sources import Found


@click.group(cls=Group)
def models() -> None:
    """List, fetch, find and describe models.

    NAME is a name of the list, a hub id (owner/name), a folder, a .gguf file or a name from the settings.
    """


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_models(as_json: bool) -> None:
    """List the models known by a short name, and where they lie."""
    rows = _rows(shared_runtime())
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    cells = [
        (row["name"], row["kind"], _size(row["size"]), row["languages"], "yes" if row["path"] else "no", row["summary"])
        for row in rows
    ]
    click.echo(table(("NAME", "KIND", "SIZE", "LANGUAGES", "HERE", "SUMMARY"), cells))


@models.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def pull(names: tuple[str, ...]) -> None:
    """Fetch models, going on with what was begun; print where each lies."""
    runtime = shared_runtime()
    for name in names:
        click.echo(_find(name, runtime, None).path)


@models.command()
@click.argument("name")
@click.option(
    "--format", "file_format", type=click.Choice(["hf", "gguf"]), default="hf", show_default=True,
    help="The Hugging Face folder (a GGUF file is dequantized once), or the GGUF file.",
)  # fmt: skip
def path(name: str, file_format: Literal["hf", "gguf"]) -> None:
    """Print where a model lies, fetching it where needed."""
    click.echo(_find(name, shared_runtime(), file_format).path)


@models.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Describe a model: architecture, size, context, licence, fingerprint. It is fetched where needed."""
    from calpaca.core.model_card import read_card

    card = asdict(read_card(_find(name, shared_runtime(), None)))
    if as_json:
        click.echo(json.dumps(card, ensure_ascii=False, indent=2, default=str))
        return
    for field, value in card.items():
        if value is not None:
            shown = _size(value) if field == "size" else f"{value:,}" if isinstance(value, int) else value
            click.echo(f"{field.replace('_', ' '):<16}{shown}")


def _find(name: str, runtime: Runtime, file_format: Literal["hf", "gguf"] | None) -> Found:
    from calpaca.core.catalogue import ENTRIES
    from calpaca.core.sources import resolve_embedding, resolve_model

    spec = runtime.spec(name)
    entry = ENTRIES.get((spec.model or "").lower())
    if entry is None or entry.kind == "chat":
        return resolve_model(spec.model, runtime, revision=spec.revision, format=file_format)
    if file_format == "gguf":
        raise UnsupportedError(f"{entry.name} is an embedding model and has no GGUF file.", "Leave out --format.")
    return resolve_embedding(entry.name, runtime)


def _rows(runtime: Runtime) -> list[dict[str, Any]]:
    """The catalogue, then the named models of the settings."""
    from calpaca.core.catalogue import ENTRIES
    from calpaca.core.sources import find_cached

    rows = []
    for entry in ENTRIES.values():
        found = find_cached(entry, runtime)
        rows.append(
            {
                "name": entry.name,
                "kind": entry.kind,
                "size": entry.size,
                "languages": entry.languages,
                "licence": entry.licence,
                "path": str(found.path) if found else None,
                "source": found.source if found else None,
                "summary": entry.summary,
            }
        )
    for name, spec in runtime.settings.models.items():
        rows.append(
            {"name": name, "kind": "settings", "size": 0, "languages": "", "licence": "", "path": None, "source": None,
             "summary": str(spec)}
        )  # fmt: skip
    return rows


def _size(size: int) -> str:
    """Bytes as a person reads them; a dash where they are not known."""
    if not size:
        return "-"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
