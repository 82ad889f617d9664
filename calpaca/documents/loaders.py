"""Finding files and reading them with the loader that knows their kind.

Nothing heavy is imported here: plugins describe their loaders with `LoaderComponent` when they are registered.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from calpaca.core.errors import CalpacaError, DocumentError
from calpaca.core.registry import Component, Registry
from calpaca.documents.ignore import IgnoreRules

if TYPE_CHECKING:
    from langchain_core.documents import Document

MOST_BYTES = 1 << 30
"""Size of a file that is still read: loaders hold a file in memory."""

_IGNORED_FOLDERS = frozenset({"__pycache__", "node_modules", "venv"})


@dataclass(frozen=True)
class LoaderComponent(Component):
    """A document loader and the file endings it reads, in lower case with the dot.

    The target is called with a path (str) and returns a `langchain_core.document_loaders.BaseLoader`.
    """

    suffixes: tuple[str, ...] = ()


@dataclass
class FoundFiles:
    """Files to read, those that no loader knows, counted by ending, and how many files and folders rules left out.

    `named` files were asked for one by one: one that cannot be read is an error, where one that was found in a folder
    or by a pattern is skipped.
    """

    named: list[Path] = field(default_factory=list)
    in_folders: list[Path] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    ignored: int = 0

    def __iter__(self) -> Iterator[Path]:
        """All files, each once."""
        return iter(dict.fromkeys((*self.named, *self.in_folders)))


def find_files(paths: Sequence[str | Path], loaders: Registry[Component]) -> FoundFiles:
    """The files at `paths`, which may be patterns (`notes/**/*.md`); folders are searched all the way down.

    Hidden files and folders are left out, as are those that `.gitignore` and `.calpacaignore` name; links are followed,
    once. Raises DocumentError when a path does not exist or a pattern fits nothing.
    """
    found = FoundFiles()
    known = {suffix for loader in loaders for suffix in getattr(loader, "suffixes", ())}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            _search(path, known, found)
        elif path.exists():
            found.named.append(path.resolve())
        elif glob.has_magic(str(path)):
            found.in_folders += _matching(path)
        else:
            raise DocumentError(f"There is no file or folder {given}.", _nearby(path))
    return found


def _matching(pattern: Path) -> list[Path]:
    """Files that fit a pattern, hidden ones only where it says so."""
    files = [Path(name).resolve() for name in sorted(glob.glob(str(pattern), recursive=True)) if Path(name).is_file()]  # noqa: PTH207  # Path.glob takes no absolute pattern
    if not files:
        raise DocumentError(f"No file fits the pattern {pattern}.", "`**` stands for any folders, `*` for any name.")
    return files


def _search(folder: Path, known: set[str], found: FoundFiles) -> None:
    """Add the files below `folder`, in the order of their names."""
    seen: set[tuple[int, int]] = set()
    rules: dict[Path, IgnoreRules] = {}

    def unlisted(error: OSError) -> None:
        found.in_folders.append(Path(error.filename))  # reading it will fail, and be told like a file's

    for walked, folders, files in os.walk(folder, onerror=unlisted, followlinks=True):
        parent = Path(walked)
        status = parent.stat()
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        rules[parent] = here = IgnoreRules(parent, rules.get(parent.parent))
        visible = [name for name in folders if not name.startswith(".") and name not in _IGNORED_FOLDERS]
        folders[:] = sorted(name for name in visible if not here.leave_out(parent / name, is_folder=True))
        found.ignored += len(visible) - len(folders)
        for name in sorted(name for name in files if not name.startswith(".")):
            _add(parent / name, here, known, found)


def _add(path: Path, rules: IgnoreRules, known: set[str], found: FoundFiles) -> None:
    suffix = path.suffix.lower()
    if rules.leave_out(path):
        found.ignored += 1
    elif suffix in known:
        # A link that leads nowhere or to itself is told by its own name.
        found.in_folders.append(path.resolve() if path.exists() else path.absolute())
    else:
        found.unknown[suffix or "no ending"] = found.unknown.get(suffix or "no ending", 0) + 1


def _nearby(path: Path) -> str:
    from calpaca.core.errors import nearest

    try:
        match = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    except OSError:
        return f"The folder {path.parent} does not exist either."
    return f"Did you mean {path.parent / match}?" if match else "Check the path."


def check_file(path: Path) -> None:
    """Look at a file before it is opened: of a pipe nobody may ever write the end.

    Raises DocumentError for what is no ordinary file, cannot be reached, or is too large.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror or error}.", "Check where it leads to.") from error
    if stat.S_ISDIR(status.st_mode):
        raise DocumentError(f"The folder {path} cannot be listed.", "Check its permissions.")
    if not stat.S_ISREG(status.st_mode):
        raise DocumentError(f"{path} is no ordinary file, but a pipe or a device.", "Write its text into a file.")
    if status.st_size > MOST_BYTES:
        raise DocumentError(
            f"{path} has {status.st_size >> 20:,} MiB, more than the {MOST_BYTES >> 20:,} MiB that are read.",
            "Split it into several files.",
        )


def load_file(path: Path, loaders: Registry[Component]) -> list[Document]:
    """Read a file with the loader for its ending; a file with an ending that none knows is tried as text.

    Raises DocumentError when the file cannot be read, is too large, or holds no text.
    """
    suffix = path.suffix.lower()
    component = next((loader for loader in loaders if suffix in getattr(loader, "suffixes", ())), None)
    check_file(path)
    try:
        documents: list[Document] = list((component or loaders.get("text")).load()(str(path)).lazy_load())
    except CalpacaError:
        raise
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror or error}.", "Check its permissions.") from error
    except Exception as error:  # a plugin's loader may raise anything
        raise DocumentError(f"{path} cannot be read: {error}.", "Check that the file is not damaged.") from error
    if not any(document.page_content.strip() for document in documents):
        raise DocumentError(f"{path} holds no text.", "Name a file with text in it.")
    return documents
