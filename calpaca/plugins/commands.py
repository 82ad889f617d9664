"""Commands that plugins add to the program: entry points of the group `calpaca.commands`.

    [project.entry-points."calpaca.commands"]
    serve = "my_plugin.command:serve"

The name is the command's, the value the import path of a click command, and the sentence in the list of commands is the
summary of the distribution. All three stand in the distribution's metadata, so that `--help` imports no plugin.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from calpaca.core.errors import PluginError

GROUP = "calpaca.commands"
PLUGINS = "calpaca"


@dataclass(frozen=True)
class PluginCommand:
    """A command of an installed plugin, not imported yet. `clash` names whom else the command belongs to."""

    name: str
    summary: str
    target: str
    distribution: str
    clash: str = ""

    def load(self) -> Any:
        """The click command. Raises PluginError when its name is taken or what it names cannot be imported."""
        if self.clash:
            raise PluginError(
                f"The distribution {self.distribution} offers the command '{self.name}', which {self.clash} has already.",
                f"Uninstall {self.distribution}, or leave its plugin out of CALPACA_PLUGINS.",
            )
        try:
            return metadata.EntryPoint(self.name, self.target, GROUP).load()
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"The command '{self.name}' of {self.distribution} cannot be imported: {error}.",
                f"Reinstall {self.distribution}.",
            ) from error


def plugin_commands(core: Collection[str]) -> dict[str, PluginCommand]:
    """Commands of the installed plugins by name; `core` names those of the program itself.

    A plugin that CALPACA_PLUGINS leaves out adds none. Where two distributions offer one name the first keeps it; any
    clash is an error once the command is used.
    """
    found: dict[str, PluginCommand] = {}
    seen: set[str] = set()
    for distribution in metadata.distributions():
        if GROUP not in (distribution.read_text("entry_points.txt") or "") or not _allowed(distribution):
            continue
        commands = distribution.entry_points.select(group=GROUP)
        owner = str(distribution.metadata["Name"])
        if owner in seen:
            continue  # an older copy further along the path
        seen.add(owner)
        for entry in commands:
            earlier = found.get(entry.name)
            clash = "calpaca itself" if entry.name in core else earlier.distribution if earlier else ""
            summary = str(distribution.metadata["Summary"] or "")
            found[entry.name] = PluginCommand(entry.name, summary, entry.value, owner, clash)
    return dict(sorted(found.items()))


def _allowed(distribution: metadata.Distribution) -> bool:
    """Whether CALPACA_PLUGINS lets a plugin of this distribution be loaded."""
    value = os.environ.get("CALPACA_PLUGINS")
    if value is None:
        return True
    wanted = {name.strip() for name in value.split(",")}
    return any(entry.name in wanted for entry in distribution.entry_points.select(group=PLUGINS))
