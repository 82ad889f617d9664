"""Apps under the names by which they are run: as they are installed, and as the settings configure them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calpaca.core.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime
    from calpaca.plugins.app import App


@dataclass(frozen=True)
class Instance:
    """An app under a name, with the options that the settings give it."""

    name: str
    app: App
    presets: Mapping[str, Any]


def instances(runtime: Runtime) -> dict[str, Instance]:
    """Every name that can be run: the installed apps, and `[apps.NAME]` of the settings whose app is installed.

    A section called like an app gives that app its defaults.
    """
    found = {app.name: Instance(app.name, app, {}) for app in runtime.apps}  # type: ignore[arg-type]
    for name, section in runtime.settings.apps.items():
        app = str(section.get("app", name))
        if app in runtime.apps:
            presets = {key: value for key, value in section.items() if key != "app"}
            found[name] = Instance(name, runtime.apps.get(app), presets)  # type: ignore[arg-type]
    return found


def find_instance(name: str, runtime: Runtime) -> Instance:
    """Raises UsageError with the nearest name, or with the distribution to install for an app that is known."""
    from calpaca.plugins.catalogue import plugin_offering

    known = instances(runtime)
    if name in known:
        return known[name]
    section = runtime.settings.apps.get(name, {})
    app = str(section.get("app", name))
    plugin = plugin_offering(app)
    if plugin is not None:
        record = next((record for record in runtime.plugins.records if record.name == plugin.name), None)
        if record is None:
            raise UsageError(f"App '{app}' is not installed.", f"Install it with: pip install {plugin.distribution}")
        hint = "CALPACA_PLUGINS leaves it out." if record.state == "blocked" else "See: calpaca plugins"
        raise UsageError(f"App '{app}' is not there: its plugin {record} is {record.state}.", hint)
    raise UsageError(*unknown_name("app", app, known))
