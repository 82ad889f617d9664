"""Plugins fill the registries of a runtime: here the two meet."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from calpaca.core.errors import PluginError
from calpaca.core.registry import Registry
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings, read_settings
from calpaca.plugins.discovery import PluginRecord, PluginSet, allowed_plugins, installed_plugins, load_plugins

logger = logging.getLogger("calpaca")

STRICT = "CALPACA_STRICT_PLUGINS"
"""The variable under which a broken plugin is an error, also in processes that this one starts."""

_lock = threading.Lock()
_shared: Runtime | None = None


def runtime() -> Runtime:
    """The runtime of this process, made when it is first asked for. Thread-safe."""
    global _shared  # noqa: PLW0603  # one per process is what the function promises
    with _lock:
        if _shared is None:
            _shared = build_runtime(read_settings())
        return _shared


def build_runtime(settings: Settings, plugins: PluginSet | None = None) -> Runtime:
    """A runtime of its own, with the installed plugins or the given ones.

    Each broken plugin is one line in the log; under CALPACA_STRICT_PLUGINS=1 the first one raises PluginError.
    """
    built = Runtime(settings)
    built.plugins = load_plugins(installed_plugins(), allowed_plugins()) if plugins is None else plugins
    registries: dict[str, Registry[Any]] = {
        "register_apps": built.apps,
        "register_engines": built.engines,
        "register_sources": built.sources,
        "register_loaders": built.loaders,
        "register_stores": built.stores,
    }
    for record in built.plugins.records:
        _fill(registries, record, built.plugins)
    for record in built.plugins.failed():
        if os.environ.get(STRICT) == "1":
            raise PluginError(f"Plugin {record} is {record.state}: {record.error}", record.hint)
        logger.warning("Plugin %s is %s: %s %s", record, record.state, record.error, record.hint)
    return built


def _fill(registries: dict[str, Registry[Any]], record: PluginRecord, plugins: PluginSet) -> None:
    """Add all that a plugin offers, or nothing when a name is taken."""
    try:
        for hook, components in record.offers.items():
            for component in components:
                registries[hook].add(component, str(record))
    except PluginError as error:
        for registry in registries.values():
            registry.withdraw(str(record))
        plugins.refuse(record, error)
