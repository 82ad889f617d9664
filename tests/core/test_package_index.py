"""Finding a file on a package index: which indexes are asked, and what they may answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calpaca.core import package_index
from calpaca.core.errors import DownloadError
from calpaca.core.package_index import find_file, index_urls, open_client

SHA = "ab" * 32
WHEEL = "some_model-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def _find(*indexes: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PIP_INDEX_URL", indexes[0])
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", " ".join(indexes[1:]))
    with open_client() as client:
        return find_file(client, "Some.Model", WHEEL, SHA)


def _serve_json(web, *files: dict[str, object], at: str = "/simple") -> str:
    web.files[f"{at}/some-model/"] = json.dumps({"files": list(files)}).encode()
    web.types[f"{at}/some-model/"] = "application/vnd.pypi.simple.v1+json"
    return f"{web.url}{at}"


def _serve_html(web, *links: str) -> str:
    body = "".join(f"<a href='{link}'>file</a>" for link in links)
    web.files["/simple/some-model/"] = f"<!DOCTYPE html><html><body>{body}</body></html>".encode()
    web.types["/simple/some-model/"] = "text/html; charset=utf-8"
    return f"{web.url}/simple/"


def test_a_json_index_is_read_and_the_file_is_told_by_its_digest(web, monkeypatch) -> None:
    index = _serve_json(
        web,
        {"filename": WHEEL, "url": "/wrong", "hashes": {"sha256": "00" * 32}},
        {"filename": "renamed.whl", "url": "../../files/right", "hashes": {"sha256": SHA}},
    )
    assert _find(index, monkeypatch=monkeypatch) == f"{web.url}/files/right"


def test_an_html_index_is_read(web, monkeypatch) -> None:
    index = _serve_html(web, f"../../files/{WHEEL}#sha256={'00' * 32}", f"../../other/{WHEEL}#sha256={SHA}")
    assert _find(index, monkeypatch=monkeypatch) == f"{web.url}/other/{WHEEL}"


def test_an_index_without_digests_is_believed_by_name(web, monkeypatch) -> None:
    index = _serve_html(web, "/files/some_model-0.9-py3-none-any.whl", f"/files/{WHEEL}")
    assert _find(index, monkeypatch=monkeypatch) == f"{web.url}/files/{WHEEL}"


def test_the_next_index_is_asked_when_one_lacks_the_file(web, monkeypatch) -> None:
    one = _serve_json(web, at="/empty")
    two = _serve_json(web, {"filename": WHEEL, "url": "/right", "hashes": {"sha256": SHA}}, at="/full")
    assert _find(f"{web.url}/nothing", one, two, monkeypatch=monkeypatch) == f"{web.url}/right"


def test_the_error_names_what_every_index_said_but_no_password(web, monkeypatch) -> None:
    web.files["/page/some-model/"] = b"{broken"
    web.types["/page/some-model/"] = "application/json"
    one = web.url.replace("//", "//me:secret@") + "/nothing"
    with pytest.raises(DownloadError) as raised:
        _find(one, f"{web.url}/page", "http://127.0.0.1:9/simple", monkeypatch=monkeypatch)
    assert "/nothing answered 404" in raised.value.message
    assert "/page is no package index" in raised.value.message
    assert "http://127.0.0.1:9/simple: " in raised.value.message
    assert "secret" not in str(raised.value)
    assert "PIP_INDEX_URL" in raised.value.hint


def test_credentials_go_to_the_same_server_only(web, monkeypatch) -> None:
    _serve_json(
        web,
        {"filename": WHEEL, "url": "/right", "hashes": {"sha256": SHA}},
    )
    index = web.url.replace("//", "//me:secret@") + "/simple"
    assert _find(index, monkeypatch=monkeypatch) == web.url.replace("//", "//me:secret@") + "/right"
    _serve_json(web, {"filename": WHEEL, "url": "http://elsewhere.invalid/right", "hashes": {"sha256": SHA}})
    assert _find(index, monkeypatch=monkeypatch) == "http://elsewhere.invalid/right"


@pytest.mark.parametrize("name", ["UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"])
def test_the_environment_names_the_index(name: str, monkeypatch) -> None:
    monkeypatch.setenv(name, "https://mirror.invalid/simple/")
    monkeypatch.setenv("UV_INDEX", "own=https://own.invalid/simple file:///wheels")
    assert index_urls() == ["https://mirror.invalid/simple", "https://own.invalid/simple"]


def test_pips_configuration_file_names_the_index(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://mirror.invalid/100%25/simple\n"
        "extra-index-url =\n    https://own.invalid/simple\n    file:///mirror/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    assert index_urls() == ["https://mirror.invalid/100%25/simple", "https://own.invalid/simple"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://first.invalid/simple")
    assert index_urls()[0] == "https://first.invalid/simple"


def test_without_configuration_pips_own_default_is_asked() -> None:
    assert index_urls()[0].startswith("https://")


def test_an_environment_without_pip_asks_the_one_that_python_carries(tmp_path: Path, monkeypatch) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    assert subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode != 0
    with_pip = index_urls()
    monkeypatch.setattr(package_index.sys, "executable", str(python))
    assert index_urls() == with_pip


def test_no_index_at_all_is_an_error_that_says_what_to_set(monkeypatch) -> None:
    monkeypatch.setattr(package_index, "_default_index", lambda: None)
    with pytest.raises(DownloadError, match="No Python package index is known") as raised:
        index_urls()
    assert "PIP_INDEX_URL" in raised.value.hint
