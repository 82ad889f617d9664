"""The commands that what is being typed may become. Tab writes the first one out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.text import Text
from textual.widgets import Static

if TYPE_CHECKING:
    from calpaca.tui.commands import Command
    from calpaca.tui.composer import Composer

_MOST = 8


class Completion(Static):
    """A list over the composer, shown while a command's name is typed. `apps` are commands beside the chat's own."""

    def __init__(self, apps: Mapping[str, Command]) -> None:
        super().__init__(id="completion", markup=False)
        self._apps = apps
        self._names: list[str] = []
        self.display = False

    def match(self, text: str) -> None:
        """List what the text may become; nothing where it is no command, or a whole one."""
        from calpaca.tui.commands import matching  # the commands open the screens that this file is part of

        found = matching(text, self._apps)
        self._names = list(found)
        self.display = bool(found)
        rows = [
            Text.assemble((f"/{name} {command.takes}".rstrip(), "bold"), f"  {command.sentence}")
            for name, command in list(found.items())[:_MOST]
        ]
        if len(found) > _MOST:
            rows.append(Text(f"… {len(found) - _MOST} more; /help lists all", "italic"))
        self.update(Text("\n", no_wrap=True, overflow="ellipsis").join(rows))

    def complete(self, composer: Composer) -> bool:
        """Write the first name out; what all of them begin with, where that is more than is there."""
        if not self._names:
            return False
        composer.write(f"/{self._names[0]} ")
        return True
