"""`calpaca settings`: the values in force, and where calpaca reads and writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from calpaca.core.paths import cache_dir, config_dir, data_dir
from calpaca.core.settings import PROJECT_FILE, read_settings, user_file


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def settings(as_json: bool) -> None:
    """Show the settings in force and where files lie.

    A value is taken from the typed option, the environment (CALPACA_MODEL, CALPACA_SAMPLING__TEMPERATURE),
    calpaca.toml in the current folder, or config.toml in the user's folder, in this order.
    """
    values = read_settings().model_dump(mode="json")
    files = {"project": str(PROJECT_FILE.resolve()), "user": str(user_file())}
    folders = {"cache": str(cache_dir()), "data": str(data_dir()), "config": str(config_dir())}
    if as_json:
        everything = {"settings": values, "files": files, "folders": folders}
        click.echo(json.dumps(everything, ensure_ascii=False, indent=2))
        return
    for name, value in _flat(values):
        click.echo(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    click.echo("\nRead from")
    for name, file in files.items():
        click.echo(f"  {name:<8}{file}{'' if Path(file).exists() else '  (not there)'}")
    click.echo("Written to")
    for name in ("cache", "data"):
        click.echo(f"  {name:<8}{folders[name]}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a tree."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
