"""`calpaca train`: its subcommands are imported when they are used."""

from __future__ import annotations

from importlib import import_module

import click

from calpaca.cli.group import Group

_COMMANDS = {
    "init": ("calpaca_trainer.commands.init:init", "Write a commented recipe."),
    "data": ("calpaca_trainer.commands.data:data", "Check training data."),
    "sft": ("calpaca_trainer.commands.run:sft", "Fine-tune on conversations and instructions."),
    "pretrain": ("calpaca_trainer.commands.run:pretrain", "Go on with pre-training, on plain texts."),
}
"""Name: (import path, sentence)."""


class TrainGroup(Group):
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


@click.group(cls=TrainGroup)
def train() -> None:
    """Fine-tunes and pre-trains models, with adapters or in full."""
