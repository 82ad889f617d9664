"""`calpaca train`: its subcommands are imported when they are used."""

from __future__ import annotations

import click

from calpaca.cli.group import LazyGroup

_COMMANDS = {
    "init": ("calpaca_trainer.commands.init:init", "Write a commented recipe."),
    "data": ("calpaca_trainer.commands.data:data", "Check training data."),
    "sft": ("calpaca_trainer.commands.run:sft", "Fine-tune on conversations and instructions."),
    "pretrain": ("calpaca_trainer.commands.run:pretrain", "Go on with pre-training, on plain texts."),
}


@click.group(cls=LazyGroup, commands_by_path=_COMMANDS)
def train() -> None:
    """Fine-tunes and pre-trains models, with adapters or in full."""
