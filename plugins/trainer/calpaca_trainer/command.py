"""`calpaca train`: its subcommands are imported when they are used."""

from __future__ import annotations

import click

from calpaca.cli.group import LazyGroup

_COMMANDS = {
    "init": ("calpaca_trainer.commands.init:init", "Write a commented recipe."),
    "data": ("calpaca_trainer.commands.data:data", "Check training data."),
    "sft": ("calpaca_trainer.commands.run:sft", "Fine-tune on conversations and instructions."),
    "pretrain": ("calpaca_trainer.commands.run:pretrain", "Go on with pre-training, on plain texts."),
    "dpo": ("calpaca_trainer.commands.run:dpo", "Learn from preferred answers (DPO, KTO)."),
    "gate": ("calpaca_trainer.commands.gate:gate", "Compare with and without an adapter, and name it if it wins."),
}


@click.group(cls=LazyGroup, commands_by_path=_COMMANDS)
def train() -> None:
    """Fine-tunes and pre-trains models, with adapters or in full, and judges what came of it."""
