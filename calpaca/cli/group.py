"""Command groups: they suggest the nearest command for one they do not know, and import a command when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from calpaca.core.errors import UsageError, unknown_name


class Group(click.Group):
    """Every group of calpaca's commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise UsageError(*unknown_name("command", name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """A group whose commands are imported when they are used, so that `--help` costs nothing.

    `commands_by_path` names them: name: (`module:attribute`, sentence).
    """

    def __init__(self, *arguments: Any, commands_by_path: Mapping[str, tuple[str, str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.commands_by_path = commands_by_path

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_by_path)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_by_path:
            return None
        module, _, attribute = self.commands_by_path[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in self.commands_by_path.items()])
