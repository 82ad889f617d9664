"""A command group that suggests the nearest command for one it does not know."""

from __future__ import annotations

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
