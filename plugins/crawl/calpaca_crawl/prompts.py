"""Prompts, topics, task kinds, seeds and word lists: text files of this package, or of a folder that replaces them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from shutil import copy
from string import Template
from typing import Any

from calpaca.core.errors import UsageError
from calpaca.core.language import Language

_PACKAGED = Path(str(files("calpaca_crawl"))) / "prompts"


@dataclass(frozen=True)
class Prompts:
    """The files of one language; a file of the same name in `folder` stands in place of ours."""

    language: Language
    folder: Path | None = None

    def text(self, name: str) -> str:
        """The content of a file. Raises UsageError for one that cannot be read."""
        own = self.folder / name if self.folder is not None else None
        path = own if own is not None and own.is_file() else _PACKAGED / self.language / name
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"The prompt {path} cannot be read: {error}.", "It must be a text file in UTF-8."
            ) from error

    def filled(self, name: str, **values: object) -> str:
        """A prompt with `$name` replaced. Raises UsageError for a name that it should not hold."""
        try:
            return Template(self.text(f"{name}.md")).substitute(values).strip()
        except (KeyError, ValueError) as error:
            known = ", ".join(f"${each}" for each in values)
            raise UsageError(
                f"The prompt {name}.md cannot be filled in: {error}.", f"It may hold {known}; $$ is a dollar."
            ) from error

    def lines(self, name: str) -> list[str]:
        """The lines of a list, without blank ones."""
        found = [line.strip() for line in self.text(f"{name}.txt").splitlines() if line.strip()]
        if not found:
            raise UsageError(f"The list {name}.txt is empty.", "Write one entry on each line.")
        return found

    def seeds(self) -> list[dict[str, Any]]:
        """The rows that bootstrapping begins with."""
        return [json.loads(line) for line in self.text("seeds.jsonl").splitlines() if line.strip()]

    def copy_to(self, folder: Path) -> list[Path]:
        """Write all files of the language to a folder, to be edited; those that are there already stay."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for file in sorted((_PACKAGED / self.language).iterdir()):
            if file.is_file() and not (folder / file.name).exists():
                written.append(Path(copy(file, folder / file.name)))
        return written
