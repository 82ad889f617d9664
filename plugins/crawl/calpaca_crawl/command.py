"""`calpaca crawl`: its subcommands are imported when they are used."""

from __future__ import annotations

from importlib import import_module

import click

from calpaca.cli.group import Group

_COMMANDS = {
    "instructions": ("calpaca_crawl.commands.instructions:instructions", "Make instruction data with language models."),
    "web": ("calpaca_crawl.commands.web:web", "Collect the pages of websites as documents."),
}
"""Name: (import path, sentence)."""


class CrawlGroup(Group):
    """The subcommands of `_COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in _COMMANDS.items()])


@click.group(cls=CrawlGroup)
def crawl() -> None:
    """Makes instruction data with language models, and corpora from the web."""
