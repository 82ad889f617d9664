"""Downloads against a server on this machine that cuts connections, lies, or is not there."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from calpaca.core import disk
from calpaca.core import download as module
from calpaca.core.download import download
from calpaca.core.errors import DownloadError

BODY = os.urandom(3_000_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def target(tmp_path: Path, own_cache: Path, web) -> Path:
    web.files["/model.bin"] = BODY
    return tmp_path / "models" / "model.bin"


def test_a_file_arrives_whole(web, target: Path, capfd) -> None:
    assert download(f"{web.url}/model.bin", target, sha256=DIGEST, size=len(BODY)) == target
    assert target.read_bytes() == BODY
    assert [file.name for file in target.parent.iterdir()] == ["model.bin"]
    assert capfd.readouterr().err == ""  # no bar where stderr is no terminal


def test_a_file_that_is_there_is_not_fetched_again(web, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"here")
    download(f"{web.url}/model.bin", target, sha256=DIGEST)
    assert web.requests == []


@pytest.mark.parametrize("size", [None, len(BODY)])
def test_a_cut_connection_is_taken_up_where_it_broke(web, target: Path, size: int | None) -> None:
    web.cut = [2_000_000]
    download(f"{web.url}/model.bin", target, sha256=DIGEST, size=size)
    assert target.read_bytes() == BODY
    first, second = web.requests
    assert first[2] is None
    assert int(second[2].removeprefix("bytes=").rstrip("-")) > 0


def test_what_arrived_is_kept_for_the_next_run(web, target: Path) -> None:
    web.cut = [1_200_000, 300_000, 100]
    with pytest.raises(DownloadError, match=r"are kept and will be continued") as raised:
        download(f"{web.url}/model.bin", target, sha256=DIGEST, size=len(BODY))
    assert "run the same command again" in raised.value.hint
    assert not target.exists()
    kept = target.with_name("model.bin.part").stat().st_size
    assert kept > 0
    download(f"{web.url}/model.bin", target, sha256=DIGEST, size=len(BODY))
    assert target.read_bytes() == BODY
    assert web.requests[-1][2] == f"bytes={kept}-"


def test_a_server_without_ranges_sends_it_all_again(web, target: Path) -> None:
    web.cut, web.knows_ranges = [1_500_000], False
    download(f"{web.url}/model.bin", target, sha256=DIGEST, size=len(BODY))
    assert target.read_bytes() == BODY


def test_a_wrong_digest_names_both_and_keeps_nothing(web, target: Path) -> None:
    with pytest.raises(DownloadError) as raised:
        download(f"{web.url}/model.bin", target, sha256="0" * 64)
    assert DIGEST in raised.value.message
    assert "0" * 64 in raised.value.message
    assert list(target.parent.iterdir()) == []


def test_a_leftover_of_another_file_does_not_stay_in_the_way(web, target: Path) -> None:
    target.parent.mkdir()
    target.with_name("model.bin.part").write_bytes(b"x" * 4_000_000)
    download(f"{web.url}/model.bin", target, sha256=DIGEST, size=len(BODY))
    assert target.read_bytes() == BODY


def test_a_missing_file_is_said_with_the_servers_answer(web, target: Path) -> None:
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1 answered 404 .* for model\.bin"):
        download(f"{web.url}/other.bin", target, sha256=DIGEST)


def test_a_server_that_is_not_there_is_said_without_the_password(target: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(DownloadError, match=r"could not be fetched from 127\.0\.0\.1") as raised:
        download(f"http://me:secret@127.0.0.1:{port}/model.bin", target, sha256=DIGEST)
    assert "secret" not in str(raised.value)


def test_too_little_room_is_said_before_anything_is_fetched(web, target: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(10, 10, 1_000_000))
    with pytest.raises(DownloadError, match=r"model\.bin needs 3\.0 MB in .*, but 1\.0 MB are free"):
        download(f"{web.url}/model.bin", target, sha256=DIGEST, size=len(BODY))
    assert web.requests == []


def test_a_disk_that_fills_up_is_said_with_the_size_needed(web, target: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(DownloadError, match=r"The disk of .* is full; model\.bin needs 3\.0 MB"):
        download(f"{web.url}/model.bin", target, sha256=DIGEST, size=len(BODY))


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs the right to mount a tiny disk")
def test_a_really_full_disk(web, tmp_path: Path, own_cache: Path) -> None:
    """On a 1 MB tmpfs of its own; the size is not told, so only writing finds out."""
    web.files["/model.bin"] = BODY
    small = tmp_path / "small"
    small.mkdir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom calpaca.core.download import download\n"
        f"download({web.url + '/model.bin'!r}, Path({str(small)!r}) / 'model.bin', sha256={DIGEST!r})"
    )
    command = f'mount -t tmpfs -o size=1m none {small} && exec {sys.executable} -c "$CODE"'
    done = subprocess.run(  # the caller looks at the exit code
        ["unshare", "--mount", "sh", "-c", command],
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert "DownloadError: The disk of" in done.stderr.replace("calpaca.core.errors.", "")


def test_two_processes_fetch_once(web, target: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom calpaca.core.download import download\n"
        f"download({web.url + '/model.bin'!r}, Path({str(target)!r}), sha256={DIGEST!r})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert target.read_bytes() == BODY
    assert len(web.requests) == 1
