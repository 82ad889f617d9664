"""Flags from an app's options model: one for each field."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from calpaca.core.errors import PluginError
from calpaca.plugins.options import SHARED, ModelOptions, SamplingOptions, flag_name, owner_of, value_type

RUN_FLAGS = {"json", "verbose", "help"}
"""Flags of `calpaca run` itself, which no option of an app may take."""

_HEADINGS: dict[type[BaseModel], str] = {ModelOptions: "Model options", SamplingOptions: "Sampling options"}
_SCALARS: dict[type, click.ParamType[Any]] = {
    str: click.STRING,
    int: click.INT,
    float: click.FLOAT,
    Path: click.Path(path_type=Path),
}
_ALLOWED = "Allowed: str, int, float, bool, Path, an Enum, a Literal, a list or tuple of one of these, or one `| None`."


def flags(app: str, model: type[BaseModel]) -> list[click.Option]:
    """One click option for each field of `model`, the app's own first.

    Raises PluginError that names both sides when two fields, or a field and a shared flag, have one name, and for a
    field type that has no flag.
    """
    taken: dict[str, str] = {name: f"calpaca run itself (--{name})" for name in RUN_FLAGS}
    shared = {flag_name(owner, name): owner for owner in SHARED for name in owner.model_fields}
    made: list[click.Option] = []
    headings = ("Options", *_HEADINGS.values())
    for name in sorted(model.model_fields, key=lambda field: headings.index(group_of(model, field))):
        flag, owner = flag_name(model, name), owner_of(model, name)
        if flag in shared and owner not in SHARED:
            taken[flag] = f"the shared option {shared[flag].__name__}.{flag.replace('-', '_')}"
        option = option_of(app, model, name)
        for spelling in (*option.opts, *option.secondary_opts):
            _refuse_clash(app, f"{owner.__name__}.{name}", spelling.lstrip("-"), taken)
        made.append(option)
    return made


def _refuse_clash(app: str, field: str, flag: str, taken: dict[str, str]) -> None:
    if flag in taken:
        raise PluginError(
            f"App '{app}' has the option --{flag} ({field}), which is taken by {taken[flag]}.",
            "Its author must rename the field, or inherit the shared option.",
        )
    taken[flag] = field


def group_of(model: type[BaseModel], field: str) -> str:
    """The heading under which a field's flag is listed."""
    return _HEADINGS.get(owner_of(model, field), "Options")


def option_of(app: str, model: type[BaseModel], name: str) -> click.Option:
    """The option of one field. Raises PluginError for a field type that has no flag."""
    info, flag = model.model_fields[name], flag_name(model, name)
    kind, several = value_type(info.annotation)
    description = info.description or ""
    if kind is bool:
        return click.Option([name, f"--{flag}/--no-{flag}"], default=None, help=_help(description, info))
    parameter = _parameter_type(kind)
    if parameter is None:
        raise PluginError(f"The option '{name}' of app '{app}' has the type {info.annotation}.", _ALLOWED)
    return click.Option(
        [name, f"--{flag}"], type=parameter, multiple=several, help=_help(description, info), metavar=_metavar(kind)
    )


def _parameter_type(kind: Any) -> click.ParamType[Any] | None:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return click.Choice([member.value for member in kind])
    return _SCALARS.get(kind) if isinstance(kind, type) else None


def _metavar(kind: Any) -> str | None:
    return {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind) if isinstance(kind, type) else None


def _help(description: str, info: FieldInfo) -> str:
    """The description, and the default where it says something."""
    if info.is_required():
        return f"{description}  [required]".strip()
    default = info.get_default(call_default_factory=False)
    shown = default.value if isinstance(default, Enum) else default
    if shown is None or shown is False or shown == "" or (isinstance(shown, Iterable) and not shown):
        return description
    text = ", ".join(map(str, shown)) if isinstance(shown, list | tuple) else str(shown)
    return f"{description}  [default: {'on' if shown is True else text}]".strip()
