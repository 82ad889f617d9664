"""`calpaca models list`: the models known by a short name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.run import shared_runtime
from calpaca.cli.table import size, table

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_models(as_json: bool) -> None:
    """List the models known by a short name, and where they lie."""
    rows = _rows(shared_runtime())
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    cells = [
        (row["name"], row["kind"], size(row["size"]), row["languages"], "yes" if row["path"] else "no", row["summary"])
        for row in rows
    ]
    click.echo(table(("NAME", "KIND", "SIZE", "LANGUAGES", "HERE", "SUMMARY"), cells))


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
