"""`calpaca plugins`: the installed plugins, what they offer, what is wrong with them; new ones, and the same ones again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.group import LazyGroup
from calpaca.cli.table import table
from calpaca.core.errors import PluginError

if TYPE_CHECKING:
    from calpaca.plugins.discovery import PluginRecord

COMMANDS = {
    "new": ("calpaca.cli.plugins.new:new", "Write a plugin whose tests pass, to start from."),
    "freeze": ("calpaca.cli.plugins.freeze:freeze", "Print the installed plugins as pip requirements."),
    "sync": ("calpaca.cli.plugins.freeze:sync", "Install the plugins of a frozen list again."),
    "docs": ("calpaca.cli.plugins.docs:docs", "Show what a plugin offers and can be told."),
}


@click.group(cls=LazyGroup, commands_by_path=COMMANDS, invoke_without_command=True, subcommand_metavar="[COMMAND]")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.option(
    "--check",
    is_flag=True,
    help="Import all that each offers, in a process of its own; exit with 4 when anything is wrong.",
)
@click.option("--timeout", type=click.FloatRange(min=0.1), default=20.0, show_default=True, metavar="SECONDS",
              help="With --check: how long a plugin may take.")  # fmt: skip
@click.pass_context
def plugins(ctx: click.Context, as_json: bool, check: bool, timeout: float) -> None:
    """List the installed plugins and what is wrong with them.

    CALPACA_PLUGINS limits which are loaded: names separated by commas, empty for none but the built-in one.
    """
    if ctx.invoked_subcommand is not None:
        return
    records = _checked(timeout) if check else _loaded()
    click.echo(json.dumps([_row(record) for record in records], indent=2) if as_json else _table(records))
    failed = [record.name for record in records if record.state in {"broken", "incompatible"}]
    if check and failed:
        raise PluginError(f"Not working: {', '.join(sorted(failed))}.", "The list above says why.")


def _loaded() -> list[PluginRecord]:
    from calpaca.cli.run import shared_runtime

    records: list[PluginRecord] = shared_runtime().plugins.records
    return records


def _checked(timeout: float) -> list[PluginRecord]:
    from calpaca.cli.plugins.probe import probe_plugins

    return probe_plugins(timeout)


def _row(record: PluginRecord) -> dict[str, Any]:
    offers = {hook: [component.name for component in components] for hook, components in record.offers.items()}
    return {
        "name": record.name,
        "version": record.version,
        "distribution": record.distribution,
        "state": record.state,
        "hooks": record.hooks,
        "offers": offers,
        "error": record.error,
        "hint": record.hint,
        "load_time": round(record.load_time, 4),
    }


def _table(records: Sequence[PluginRecord]) -> str:
    rows = [
        (record.name, record.version, record.distribution, record.state, f"{record.load_time * 1000:.0f} ms",
         ", ".join(record.hooks) or "-")
        for record in records
    ]  # fmt: skip
    faults = [f"\n{record.name}: {record.error}\n  {record.hint}" for record in records if record.error]
    return "\n".join([table(("NAME", "VERSION", "DISTRIBUTION", "STATE", "LOADED IN", "HOOKS"), rows), *faults])
