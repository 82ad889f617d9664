"""One process at a time: locks that die with the process that holds them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calpaca.core.paths import cache_dir

logger = logging.getLogger("calpaca")

_PATIENCE = 1.0  # seconds of silence before a waiting process says so


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the right to make `target`; a second process or thread waits, and says so."""
    from filelock import FileLock, Timeout

    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(str(target.absolute()).encode()).hexdigest()[:32]
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        logger.warning("Waiting for another process that is making %s.", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
