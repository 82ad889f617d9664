"""The indexes in the cache: what each of them holds, and taking one away."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from calpaca.core.errors import DocumentError, unknown_name
from calpaca.core.paths import atomic_file, cache_dir

_FILE = "index.json"
LOCK = "manifest.lock"


@dataclass(frozen=True)
class IndexDescription:
    """What an index was made of and how. `format` says which versions of calpaca read it; 0 stands for none of today."""

    format: int = 0
    collection: str = ""
    paths: tuple[str, ...] = ()
    embedder: str = ""
    fingerprint: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> str | tuple[str, ...]:
        """What tells indexes of the same documents from others: a collection's name, else the paths."""
        return self.collection or self.paths


@dataclass(frozen=True)
class ShelvedIndex:
    """An index on disk."""

    folder: Path
    description: IndexDescription

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    @property
    def changed(self) -> float:
        """Seconds since the epoch."""
        return max((file.stat().st_mtime for file in self.folder.rglob("*") if file.is_file()), default=0.0)


def shelf() -> Path:
    """The folder that holds a folder for each index."""
    return cache_dir() / "indexes"


def indexes() -> Iterator[ShelvedIndex]:
    """All of them, those of other versions included, whose description is empty."""
    folders = sorted(shelf().iterdir()) if shelf().is_dir() else []
    visible = (folder for folder in folders if folder.is_dir() and not folder.name.startswith("."))
    return (ShelvedIndex(folder, read(folder)) for folder in visible)


def read(folder: Path) -> IndexDescription:
    """An index's description; an empty one for an index of a version that wrote none."""
    try:
        values = json.loads((folder / _FILE).read_text("utf-8"))
        return IndexDescription(**{**values, "paths": tuple(values["paths"])})
    except (OSError, ValueError, TypeError, KeyError):
        return IndexDescription()


def write(folder: Path, description: IndexDescription) -> None:
    """Raises DocumentError when there is no room for it."""
    try:
        with atomic_file(folder / _FILE) as part:
            part.write_text(json.dumps(asdict(description), ensure_ascii=False, indent=2), "utf-8")
    except OSError as error:
        raise DocumentError(
            f"The index folder {folder} cannot be written: {error.strerror or error}.",
            "Free disk space or check the permissions; CALPACA_CACHE moves it.",
        ) from error


def paths_of_collection(name: str) -> list[Path]:
    """Files and folders of a collection, as it was last indexed. Raises DocumentError when there is none."""
    named = [index for index in indexes() if index.description.collection]
    mine = [index for index in named if index.description.collection == name]
    if not mine:
        known = sorted({index.description.collection for index in named})
        message, hint = unknown_name("collection", name, known)
        raise DocumentError(message, f"{hint} Name its documents with --file to make it.")
    return [Path(path) for path in max(mine, key=lambda index: index.changed).description.paths]


def remove(index_id: str) -> Path:
    """Take an index away, by its id or a unique beginning of it; its documents stay.

    Raises DocumentError when there is none, or several, or while it is being written.
    """
    matches = [index.folder for index in indexes() if index.id.startswith(index_id)]
    if len(matches) != 1:
        known = ", ".join(index.id for index in indexes())
        raise DocumentError(f"'{index_id}' begins the id of {len(matches)} indexes.", f"There are: {known or 'none'}.")
    (folder,) = matches
    try:
        with FileLock(folder / LOCK, timeout=0):
            doomed = folder.rename(folder.with_name(f".{folder.name}.removed"))  # whole or not at all
    except Timeout as error:
        raise DocumentError(f"The index {folder.name} is being written by another process.", "Wait for it.") from error
    shutil.rmtree(doomed)
    return folder
