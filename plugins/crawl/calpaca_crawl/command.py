"""`calpaca crawl`: its subcommands are imported when they are used."""

from __future__ import annotations

import click

from calpaca.cli.group import LazyGroup

_COMMANDS = {
    "instructions": ("calpaca_crawl.commands.instructions:instructions", "Make instruction data with language models."),
    "web": ("calpaca_crawl.commands.web:web", "Collect the pages of websites as documents."),
}


@click.group(cls=LazyGroup, commands_by_path=_COMMANDS)
def crawl() -> None:
    """Makes instruction data with language models, and corpora from the web."""
