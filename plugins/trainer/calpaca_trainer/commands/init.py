"""`calpaca train init`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from calpaca.core.errors import UsageError

SCENARIOS = ("new", "continue", "pretrain", "embeddings", "full", "dpo", "kto")


@click.command()
@click.argument("scenario", type=click.Choice(SCENARIOS), default="new")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File to write; left out: stdout.")
def init(scenario: str, output: Path | None) -> None:
    """Write a commented recipe.

    SCENARIO is `new` (a new adapter, on a base or on one that adapters were merged into), `continue` (an adapter that
    exists already), `pretrain` (plain texts), `embeddings` (plain texts too, before `pretrain`: only the embeddings of a
    longer vocabulary), `full` (the whole model learns), `dpo` (pairs of a better and a worse answer) or `kto` (answers that
    are good or bad).
    """
    text = (files("calpaca_trainer") / "recipes" / f"{scenario}.toml").read_text("utf-8")
    if output is None:
        click.echo(text, nl=False)
        return
    if output.exists():
        raise UsageError(f"{output} exists already.", "Name another --output.")
    output.write_text(text, "utf-8")
    click.echo(output)
