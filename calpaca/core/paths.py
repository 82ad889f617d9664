"""Where calpaca keeps its files, and how it writes them: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp, mkstemp

from platformdirs import user_cache_path, user_config_path, user_data_path


def cache_dir() -> Path:
    """Downloads, converted models and indexes: everything here can be made again. `CALPACA_CACHE` moves it."""
    return Path(os.environ.get("CALPACA_CACHE") or user_cache_path("calpaca"))


def data_dir() -> Path:
    """The job ledger: work that should not be lost. `CALPACA_DATA` moves it."""
    return Path(os.environ.get("CALPACA_DATA") or user_data_path("calpaca"))


def config_dir() -> Path:
    """The user's settings file. `CALPACA_CONFIG` moves it."""
    return Path(os.environ.get("CALPACA_CONFIG") or user_config_path("calpaca"))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; on success it replaces `path`, on any error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files that only the owner reads; a replaced file gets what a plain open would have given.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on any error it is removed.

    When another process made `path` meanwhile, theirs stays and ours is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
