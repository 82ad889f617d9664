"""A server's file: found while it runs, stale when it was killed, and for its owner alone."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from calpaca.core.attaching import Offer, announced, find_running, offer
from calpaca.core.files import ModelFiles
from calpaca.core.paths import data_dir
from calpaca.core.spec import ModelSpec

SERVER = """
import sys, time
from calpaca.core.attaching import announced, offer
from calpaca.core.spec import ModelSpec
with announced("http://127.0.0.1:9/v1", "secret", [offer("llama", sys.argv[1], ModelSpec(dtype="float32", device="cpu"))]):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return wanted(folder)


def wanted(folder: Path, **fields: str) -> ModelFiles:
    return ModelFiles("model", ModelSpec(model=str(folder), **fields), folder, (), folder, None)


@pytest.fixture
def server(files: ModelFiles):
    process = subprocess.Popen([sys.executable, "-c", SERVER, files.fingerprint], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_running_server_with_the_same_weights_is_found(server, files: ModelFiles) -> None:
    found = find_running(files)
    assert found is not None
    assert (found.model, found.engine) == ("http://127.0.0.1:9/v1#llama", "remote")
    assert found.api_key is not None
    assert found.api_key.get_secret_value() == "secret"
    (file,) = (data_dir() / "servers").glob("*.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_weights_run_otherwise_than_asked_are_not_the_wanted_model(server, files: ModelFiles) -> None:
    assert find_running(wanted(files.weights, dtype="float32")) is not None
    for other in ({"dtype": "bfloat16"}, {"device": "cuda"}, {"engine": "llama_cpp"}):
        assert find_running(wanted(files.weights, **other)) is None
    (files.weights / "config.json").write_text('{"other": 1}')
    assert find_running(wanted(files.weights)) is None


def test_the_file_of_a_killed_server_is_removed(server, files: ModelFiles) -> None:
    server.send_signal(signal.SIGKILL)
    server.wait()
    assert list((data_dir() / "servers").glob("*.json"))
    assert find_running(files) is None
    assert not list((data_dir() / "servers").iterdir())


def test_the_file_goes_with_the_server(files: ModelFiles) -> None:
    offers = [Offer("a", "b", {}), offer("llama", files.fingerprint, ModelSpec())]
    with announced("http://127.0.0.1:9/v1", None, offers) as announcement:
        assert announcement.file.name == f"{os.getpid()}.json"
    assert not list((data_dir() / "servers").iterdir())
    assert find_running(files) is None


def test_a_damaged_file_is_passed_over(server, files: ModelFiles) -> None:
    (file,) = (data_dir() / "servers").glob("*.json")
    file.write_text("{")
    assert find_running(files) is None


def test_what_a_server_offers_may_change(files: ModelFiles, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"other": 1}')
    with announced("http://127.0.0.1:9/v1", None, []) as announcement:
        for each, name in ((files, "llama"), (wanted(other), "red")):
            assert find_running(each) is None
            announcement.tell([offer(name, each.fingerprint, ModelSpec())])
            found = find_running(each)
            assert found is not None
            assert found.model == f"http://127.0.0.1:9/v1#{name}"
        assert find_running(files) is None
