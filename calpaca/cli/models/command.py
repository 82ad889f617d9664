"""The command line in hand, kept with a job so that it can be given again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from calpaca.core.checkpoint.write import Command


def current_command() -> Command:
    """What `write_model` records, for `calpaca jobs resume`."""
    from calpaca.core.checkpoint.write import Command

    return Command(tuple(click.get_current_context().obj or ()), str(Path.cwd()))
