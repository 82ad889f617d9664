"""The disk that downloads and conversions are written to: room on it, and errors from it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calpaca.core.errors import DownloadError

_ELSEWHERE = "or point CALPACA_CACHE to another disk"


def check_space(folder: Path, needed: int, name: str, elsewhere: str = _ELSEWHERE) -> None:
    """Raise DownloadError when the disk of `folder`, which need not exist yet, has less than `needed` bytes free."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DownloadError(
            f"{name} needs {megabytes(needed)} in {folder}, but {megabytes(free)} are free.",
            f"Free some space, {elsewhere}.",
        )


@contextmanager
def disk_errors(folder: Path, name: str, needed: int = 0, elsewhere: str = _ELSEWHERE) -> Iterator[None]:
    """Turn an OSError of the block into a DownloadError; a full disk is told with the bytes that are needed."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DownloadError(
                f"The disk of {folder} is full; {name} needs {megabytes(needed)} in all.",
                f"Free some space, {elsewhere}.",
            ) from error
        raise DownloadError(
            f"{name} could not be written to {folder}: {error.strerror or error}.",
            f"Check the folder's permissions, {elsewhere}.",
        ) from error


def megabytes(size: int) -> str:
    """A size for people, in units of 10^6 bytes."""
    return f"{size / 1e6:,.1f} MB"
