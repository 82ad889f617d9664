"""`calpaca plugins docs NAME`: what a plugin offers, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

import click

from calpaca.cli.run import app_command, shared_runtime
from calpaca.core.errors import CalpacaError, PluginError, UsageError, unknown_name
from calpaca.plugins.app import App
from calpaca.plugins.commands import plugin_commands
from calpaca.plugins.instances import Instance

if TYPE_CHECKING:
    from calpaca.core.registry import Component
    from calpaca.plugins.discovery import PluginRecord

_KINDS = {
    "register_apps": "Apps",
    "register_engines": "Engines",
    "register_sources": "Sources of models",
    "register_loaders": "Document loaders",
    "register_stores": "Vector stores",
}


@click.command()
@click.argument("name")
def docs(name: str) -> None:
    """Show what a plugin offers: hooks, apps with their options, commands."""
    records: dict[str, PluginRecord] = {record.name: record for record in shared_runtime().plugins.records}
    if name not in records:
        raise UsageError(*unknown_name("plugin", name, records))
    record = records[name]
    if record.error:
        raise PluginError(f"Plugin {record} is {record.state}: {record.error}", record.hint)
    click.echo("\n".join(_page(record)))


def _page(record: PluginRecord) -> Iterator[str]:
    about = metadata.metadata(record.distribution)
    yield f"# {record.name}\n"
    yield f"{about['Summary'] or 'No summary.'} ({record.distribution} {record.version})\n"
    yield f"Hooks: {', '.join(record.hooks) or 'none'}."
    for hook, components in record.offers.items():
        yield f"\n## {_KINDS.get(hook, hook)}\n"
        for component in components:
            yield from _component(component)
    yield from _commands(record.distribution)


def _component(component: Component) -> Iterator[str]:
    yield f"- `{component.name}`: {component.summary}"
    if isinstance(component, App):
        yield f"\n```text\n{_help(component)}\n```\n"
        yield f"Settings: these options, in `[apps.{component.name}]`.\n"


def _help(app: App) -> str:
    try:
        command = app_command(Instance(app.name, app, {}))
    except CalpacaError as error:
        return f"{error.message} {error.hint}"
    return _help_of(command, f"calpaca run {app.name}")


def _help_of(command: click.Command, path: str) -> str:
    return command.get_help(click.Context(command, info_name=path, terminal_width=100)).rstrip()


def _commands(distribution: str) -> Iterator[str]:
    from calpaca.cli.main import COMMANDS

    offered = [each for each in plugin_commands(COMMANDS).values() if each.distribution == distribution]
    if offered:
        yield "\n## Commands"
    for each in offered:
        yield f"\n```text\n{_help_of(each.load(), f'calpaca {each.name}')}\n```"
