"""`calpaca train data`."""

from __future__ import annotations

import click

from calpaca.cli.group import Group


@click.group(cls=Group)
def data() -> None:
    """Check training data."""
