"""The file that a server leaves while it runs, so that other processes use its model instead of loading it again.

`servers/PID.json` in the data folder, which its owner alone may read, holds address, key and what is loaded. The server
holds a lock beside it, which dies with its process: without it the file is stale.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from calpaca.core.paths import data_dir
from calpaca.core.spec import ModelSpec

if TYPE_CHECKING:
    from calpaca.core.files import ModelFiles

_CHOSEN = ("engine", "device", "dtype", "quantization")
"""Fields of a spec that change how the same weights are run: what is asked for must be what the server has."""


@dataclass(frozen=True)
class Offer:
    """A loaded model: its id on the server, the digest of its contents, and how it is run."""

    id: str
    fingerprint: str
    spec: dict[str, Any]


def offer(id: str, fingerprint: str, spec: ModelSpec) -> Offer:
    return Offer(id, fingerprint, {name: getattr(spec, name) for name in _CHOSEN})


class Announcement:
    """What a server at `url` (it ends with /v1) tells other processes of its user; held until `withdraw`."""

    def __init__(self, url: str, key: str | None) -> None:
        folder = data_dir() / "servers"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{os.getpid()}.json"
        self._fields = {"url": url, "key": key}
        self._lock = FileLock(self.file.with_suffix(".lock"), thread_local=False)
        self._lock.acquire()

    def tell(self, offers: Sequence[Offer]) -> None:
        """These models can be asked now, and no others."""
        _write(self.file, {**self._fields, "models": [asdict(each) for each in offers]})

    def withdraw(self) -> None:
        """Nothing can be asked any more."""
        _remove(self.file, self._lock)


@contextmanager
def announced(url: str, key: str | None, offers: Sequence[Offer]) -> Iterator[Announcement]:
    """Tell of these models until the context ends."""
    announcement = Announcement(url, key)
    try:
        announcement.tell(offers)
        yield announcement
    finally:
        announcement.withdraw()


def _write(file: Path, content: dict[str, Any]) -> None:
    """For the owner's eyes only, from the first byte on; readers never see half of it."""
    part = file.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as stream:
        json.dump(content, stream)
    part.replace(file)


def _remove(file: Path, lock: FileLock) -> None:
    file.unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink()


def find_running(files: ModelFiles) -> ModelSpec | None:
    """The spec of a server's model that is the wanted one, run as it is wanted; None where no server has it.

    The files are hashed only when there is a server.
    """
    for running in _running():
        for model in running["models"]:
            if model["fingerprint"] == files.fingerprint and _fits(files.spec, model["spec"]):
                return ModelSpec(model=f"{running['url']}#{model['id']}", engine="remote", api_key=running["key"])
    return None


def _running() -> Iterator[dict[str, Any]]:
    """What the servers say that run now; files of those that do not are removed."""
    for file in sorted((data_dir() / "servers").glob("*.json")):
        lock = FileLock(file.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with suppress(OSError, ValueError):
                yield json.loads(file.read_text("utf-8"))
        except OSError:  # another user's
            continue
        else:
            _remove(file, lock)


def _fits(wanted: ModelSpec, served: dict[str, Any]) -> bool:
    """Whether a server runs the weights as they are wanted; what is left open is its to choose."""
    fields = ModelSpec.model_fields
    return all(getattr(wanted, name) in (fields[name].default, served[name]) for name in _CHOSEN)
