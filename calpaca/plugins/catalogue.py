"""The first-party plugins, known without being installed: `entry_points.toml`, which the core's wheel carries."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class KnownPlugin:
    """A plugin that can be installed: its distribution, and the apps and commands it brings."""

    name: str
    distribution: str
    summary: str
    entry_point: str
    apps: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def catalogue_file() -> Path:
    """Inside the package where calpaca was installed, at the root of the repository where it runs from there."""
    package = Path(__file__).parents[1]
    shipped = package / "entry_points.toml"
    return shipped if shipped.exists() else package.parent / "entry_points.toml"


def known_plugins() -> list[KnownPlugin]:
    """All first-party plugins by name."""
    entries = tomllib.loads(catalogue_file().read_text(encoding="utf-8"))
    return [_known(name, entry) for name, entry in sorted(entries.items())]


def _known(name: str, entry: dict[str, Any]) -> KnownPlugin:
    lists = {key: tuple(entry.get(key, ())) for key in ("apps", "commands")}
    return KnownPlugin(name=name, **{**entry, **lists})


def plugin_offering(app: str) -> KnownPlugin | None:
    """The first-party plugin that brings `app`."""
    return next((plugin for plugin in known_plugins() if app in plugin.apps), None)


def plugin_with_command(command: str) -> KnownPlugin | None:
    """The first-party plugin that brings `command`."""
    return next((plugin for plugin in known_plugins() if command in plugin.commands), None)
