"""One process at a time: locks that die with the process that holds them."""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from calpaca.core.disk import disk_errors
from calpaca.core.paths import cache_dir

logger = logging.getLogger("calpaca")

_PATIENCE = 1.0  # seconds of silence before a waiting process says so


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the right to make `target`; a second process or thread waits, and says so.

    What a killed process left half-made beside `target` is removed. Raises DownloadError when the cache cannot be
    written.
    """
    from filelock import FileLock, Timeout

    folder = cache_dir() / "locks"
    key = hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:32]
    lock = FileLock(folder / f"{key}.lock")
    with disk_errors(folder, "A lock"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            logger.warning("Waiting for another process that is making %s.", target)
            lock.acquire()
    try:
        _sweep(target)
        yield
    finally:
        lock.release()


def _sweep(target: Path) -> None:
    """Remove the temporary files and folders of `atomic_file` and `atomic_folder`: nobody else is writing them."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        if leftover.is_dir():
            rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
