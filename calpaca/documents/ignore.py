"""Files in a folder that its owner wants left out, as `.gitignore` and `.calpacaignore` say."""

from __future__ import annotations

from pathlib import Path

from pathspec import GitIgnoreSpec

from calpaca.core.errors import DocumentError

_FILES = (".gitignore", ".calpacaignore")


class IgnoreRules:
    """The rules that hold in a folder: its own, then those of the folders above it, up to where the search began.

    The pattern language is git's (gitignore(5)); the nearest file with a matching line decides.
    """

    def __init__(self, folder: Path, above: IgnoreRules | None = None) -> None:
        self._folder = folder
        self._above = above
        self._spec = GitIgnoreSpec.from_lines(_lines(folder))

    def leave_out(self, path: Path, *, is_folder: bool = False) -> bool:
        """Whether a file or folder below this folder is to be left out."""
        relative = path.relative_to(self._folder).as_posix()
        decision = self._spec.check_file(f"{relative}/" if is_folder else relative).include
        if decision is None:
            return self._above is not None and self._above.leave_out(path, is_folder=is_folder)
        return decision


def _lines(folder: Path) -> list[str]:
    """Raises DocumentError for a file of rules that cannot be read: without it too much would be indexed."""
    lines: list[str] = []
    for file in (folder / name for name in _FILES):
        try:
            lines += file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
        except OSError as error:
            raise DocumentError(
                f"{file} cannot be read: {error.strerror or error}.", "Check its permissions, or remove it."
            ) from error
    return lines
