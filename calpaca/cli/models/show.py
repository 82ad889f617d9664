"""`calpaca models show`: what a model is."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from calpaca.cli.models.files import find
from calpaca.cli.run import shared_runtime
from calpaca.cli.table import size


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Describe a model: architecture, size, context, licence, fingerprint. It is fetched where needed."""
    from calpaca.core.model_card import read_card

    card = asdict(read_card(find(name, shared_runtime(), None)))
    if as_json:
        click.echo(json.dumps(card, ensure_ascii=False, indent=2, default=str))
        return
    for field, value in card.items():
        if value is not None:
            shown = size(value) if field == "size" else f"{value:,}" if isinstance(value, int) else value
            click.echo(f"{field.replace('_', ' '):<16}{shown}")
