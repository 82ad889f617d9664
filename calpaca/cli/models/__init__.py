"""`calpaca models`: what can be used, what lies here, fetching it, and changing its form; one file per command."""

from __future__ import annotations

import click

from calpaca.cli.group import Group
from calpaca.cli.models.catalogue import list_models
from calpaca.cli.models.compare import compare
from calpaca.cli.models.convert import convert
from calpaca.cli.models.export import export
from calpaca.cli.models.files import path, pull
from calpaca.cli.models.merge import merge
from calpaca.cli.models.show import show
from calpaca.cli.models.verify import verify


@click.group(cls=Group)
def models() -> None:
    """List, fetch, describe, convert, merge, verify, compare and export models.

    NAME is a name of the list, a hub id (owner/name), a folder, a .gguf file or a name from the settings.
    """


for command in (list_models, pull, path, show, verify, compare, convert, merge, export):
    models.add_command(command)
