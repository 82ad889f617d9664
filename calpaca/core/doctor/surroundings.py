"""Folders that calpaca writes to, the environment, and the hubs and servers that it asks."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

from calpaca.core.paths import cache_dir, data_dir
from calpaca.core.settings import Settings

_VARIABLES = (
    "CALPACA_", "OMP_", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KMP_", "MALLOC_", "CUDA_VISIBLE_DEVICES", "HF_",
    "MODELSCOPE_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE",
)  # fmt: skip
_SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"(?<=//)[^/@\s\"']*@")

_WALK_SECONDS = 2.0


@dataclass(frozen=True)
class Folder:
    """A folder that calpaca writes to: bytes in it (`whole` False: at least), bytes free on its disk."""

    name: str
    path: str
    size: int = 0
    whole: bool = True
    free: int | None = None
    writable: bool = True


@dataclass(frozen=True)
class Reachable:
    """A hub or server that was asked; `error` says why it gave no answer."""

    name: str
    address: str
    error: str | None = None


def describe_folders() -> tuple[Folder, ...]:
    """calpaca's cache and data, and the cache of the Hugging Face hub."""
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub")
    folders = {"cache": cache_dir(), "data": data_dir(), "hub cache": hub.expanduser()}
    return tuple(_folder(name, path) for name, path in folders.items())


def _folder(name: str, path: Path) -> Folder:
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    size, whole = _size(path)
    return Folder(name, str(path), size, whole, disk_usage(existing).free, os.access(existing, os.W_OK))


def _size(path: Path) -> tuple[int, bool]:
    """Bytes below a folder, links not followed; False when there was no time to see all."""
    deadline = time.monotonic() + _WALK_SECONDS
    total = 0
    for folder, _, files in os.walk(path, onerror=None):
        for file in files:
            try:
                total += os.lstat(Path(folder, file)).st_size
            except OSError:
                continue
        if time.monotonic() > deadline:
            return total, False
    return total, True


def shown_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter, without passwords and keys."""
    chosen = {name: variables[name] for name in sorted(variables) if name.upper().startswith(_VARIABLES)}
    return {name: "(set)" if _SECRET.search(name) else without_password(value) for name, value in chosen.items()}


def without_password(text: str) -> str:
    """A text in which addresses carry no user and password."""
    return _PASSWORD_IN_URL.sub("", text)


def ask_hubs(settings: Settings) -> tuple[Reachable, ...]:
    """Whether the hubs and the servers of the settings answer, within the settings' time."""
    from calpaca.core.hubs import probe_endpoint
    from calpaca.core.sources import UnavailableError

    hubs = {
        "Hugging Face": os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
        "ModelScope": os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn",
        **{f"server {number}": address for number, address in enumerate(settings.remote.endpoints, 1)},
    }

    def ask(name: str) -> Reachable:
        shown = without_password(hubs[name])
        try:
            probe_endpoint(hubs[name], settings.hub_timeout)
        except UnavailableError as error:
            return Reachable(name, shown, without_password(error.message.removeprefix(f"{hubs[name]} ")))
        return Reachable(name, shown)

    with ThreadPoolExecutor(8) as threads:
        return tuple(threads.map(ask, hubs))
