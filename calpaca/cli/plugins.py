"""`calpaca plugins`: the installed plugins, what they offer, and what is wrong with them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.flags import flags
from calpaca.cli.run import shared_runtime
from calpaca.cli.table import table
from calpaca.core.errors import CalpacaError, MissingExtraError, PluginError

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime
    from calpaca.plugins.app import App
    from calpaca.plugins.discovery import PluginRecord


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.option("--check", is_flag=True, help="Also import every app; exit with 4 when anything is wrong.")
def plugins(as_json: bool, check: bool) -> None:
    """List the installed plugins and what is wrong with them.

    CALPACA_PLUGINS limits which are loaded: names separated by commas, empty for none but the built-in one.
    """
    runtime = shared_runtime()
    records: list[PluginRecord] = runtime.plugins.records
    click.echo(json.dumps([_row(record) for record in records], indent=2) if as_json else _table(records))
    if check:
        _check(runtime)


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


def _table(records: list[PluginRecord]) -> str:
    rows = [
        (record.name, record.version, record.distribution, record.state, f"{record.load_time * 1000:.0f} ms",
         ", ".join(record.hooks) or "-")
        for record in records
    ]  # fmt: skip
    faults = [f"\n{record.name}: {record.error}\n  {record.hint}" for record in records if record.error]
    return "\n".join([table(("NAME", "VERSION", "DISTRIBUTION", "STATE", "LOADED IN", "HOOKS"), rows), *faults])


def _check(runtime: Runtime) -> None:
    """Raise PluginError for the plugins that failed and the apps that cannot be run."""
    failed = {record.name for record in runtime.plugins.failed()}
    faults = [f"App '{app.name}': {fault}" for app in runtime.apps if (fault := _fault(app))]  # type: ignore[arg-type]
    if faults:
        raise PluginError(" ".join(faults), "Report this to the plugin's author.")
    if failed:
        raise PluginError(f"Not working: {', '.join(sorted(failed))}.", "The list above says why.")


def _fault(app: App) -> str:
    """What keeps an app from being run; a missing extra is no fault of the plugin."""
    try:
        flags(app.name, app.load_options())
        app.load()
    except MissingExtraError:
        return ""
    except CalpacaError as error:
        return str(error)
    except Exception as error:  # whatever a plugin's module raises while it is imported
        return f"{type(error).__name__}: {error}"
    return ""
