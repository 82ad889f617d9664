"""Which apps an outsider may run, and which of their options set: a client of the server, a language model with tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from calpaca.plugins.app import App
from calpaca.plugins.options import ModelOptions, OwnersOnly


def answers_and_reads(app: App) -> bool:
    """Whether outsiders may run an app as it is: it answers an input, and writes nothing that a person would miss."""
    return app.kind == "answer" and app.effects == "read" and app.input is not None


def open_options(app: App) -> dict[str, FieldInfo]:
    """The options that outsiders may set, by name: neither the app's input, nor a file or a model of this machine, nor
    what is marked `OwnersOnly`."""
    return {name: info for name, info in app.load_options().model_fields.items() if _is_open(app, name, info)}


def _is_open(app: App, name: str, info: FieldInfo) -> bool:
    if name in ModelOptions.model_fields or name == app.input or _names_files(info.annotation):
        return False
    return not any(isinstance(mark, OwnersOnly) for mark in info.metadata)


def _names_files(annotation: Any) -> bool:
    """Whether a type holds a path somewhere."""
    if isinstance(annotation, type) and issubclass(annotation, Path):
        return True
    return any(_names_files(argument) for argument in get_args(annotation))
