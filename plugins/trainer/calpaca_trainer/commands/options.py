"""Flags of a recipe's options, under their headings."""

from __future__ import annotations

import click
from pydantic import BaseModel

from calpaca.cli.flags import option_of
from calpaca_trainer.recipe import HEADINGS


def recipe_flags(command: str, model: type[BaseModel]) -> list[click.Option]:
    """One flag for each field, heading by heading."""
    return [option_of(command, model, name) for name in groups(model)]


def groups(model: type[BaseModel]) -> dict[str, str]:
    """The heading of every field that has a flag."""
    shown = model.model_fields.keys() - getattr(model, "absent", frozenset())
    return {name: title for title, owner in HEADINGS.items() for name in owner.model_fields if name in shown}
