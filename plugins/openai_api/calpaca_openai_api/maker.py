"""Who makes a background response: a process, as others see it that use the same file of responses."""

from __future__ import annotations

import uuid
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout


class Maker:
    """This process. It holds a lock beside `file` from its first use on, which dies with it, even when it is killed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock: FileLock | None = None

    @cached_property
    def name(self) -> str:
        """Its name, once the lock is held."""
        name = uuid.uuid4().hex
        self._lock = FileLock(_place(self._file, name), thread_local=False)
        self._lock.acquire()
        return name

    def end(self) -> None:
        """Let go of the lock: nothing is being made any more."""
        if self._lock is not None:
            self._lock.release()
            _remove(self._lock)


def lives(file: Path, name: str) -> bool:
    """Whether the process of that name still runs."""
    lock = FileLock(_place(file, name))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    _remove(lock)
    return False


def _place(file: Path, name: str) -> Path:
    return file.with_name(f"{file.name}.{name}.lock")


def _remove(lock: FileLock) -> None:
    with suppress(OSError):
        Path(lock.lock_file).unlink()
