"""What a person types, and where it leads: paths, names, hubs that answer and hubs that do not."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from calpaca.core import catalogue, hubs
from calpaca.core.catalogue import Repository
from calpaca.core.errors import CalpacaError, DownloadError, ModelNotFoundError, UnsupportedError
from calpaca.core.registry import Component
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.sources import UnavailableError, find_cached, resolve_adapter, resolve_embedding, resolve_model
from calpaca.core.spec import ModelSpec
from calpaca.plugins import builtin

TIMEOUT = 0.4


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime(Settings(hub_timeout=TIMEOUT, models={"alpaca": ModelSpec(model="base")})) as made:
        for component in builtin.register_sources():
            made.sources.add(component, "builtin")
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    return model


# ---- paths -------------------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(runtime, folder: Path, monkeypatch) -> None:
    found = resolve_model(str(folder), runtime, format="hf")
    assert (found.name, found.path, found.source) == ("my-model", folder, "local")
    monkeypatch.chdir(folder.parent)
    assert resolve_model("my-model", runtime).path == folder
    assert resolve_model("./my-model/", runtime).path == folder


def test_a_gguf_file_is_named_or_lies_alone_in_its_folder(runtime, tmp_path: Path) -> None:
    file = tmp_path / "files" / "one.gguf"
    file.parent.mkdir()
    file.write_bytes(b"")
    assert resolve_model(str(file), runtime).path == file
    assert resolve_model(str(file.parent), runtime, format="gguf").path == file
    file.with_name("two.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="holds 2 GGUF files") as raised:
        resolve_model(str(file.parent), runtime)
    assert "one.gguf, two.gguf" in raised.value.hint


def test_a_gguf_file_becomes_a_folder_when_one_is_wanted(runtime, smollm2_gguf: Path, smollm2: Path) -> None:
    assert resolve_model(str(smollm2_gguf), runtime, format="hf").path == smollm2


def test_a_folder_is_not_made_into_a_gguf_file(runtime, folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="there is no GGUF file of it"):
        resolve_model(str(folder), runtime, format="gguf")


@pytest.mark.parametrize("reference", ["{}/my-modle", "./my-modle", "my-modle.gguf", "a/b/c", "~/my-modle/"])
def test_a_path_that_does_not_exist_is_said(runtime, folder: Path, monkeypatch, reference: str) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    with pytest.raises(ModelNotFoundError, match="does not exist") as raised:
        resolve_model(reference.format(folder.parent), runtime)
    assert str(folder.parent) in raised.value.hint
    if "c" not in reference:
        assert "Did you mean" in raised.value.hint


def test_a_file_that_is_no_model_points_to_its_folder(runtime, folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"is a file, but no \.gguf file") as raised:
        resolve_model(str(folder / "model.safetensors"), runtime)
    assert str(folder) in raised.value.hint


def test_a_folder_without_a_model_is_said_unless_it_only_shares_a_models_name(
    runtime, tmp_path: Path, monkeypatch, smollm2_gguf: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m-instruct").mkdir()
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        resolve_model("./smollm2-135m-instruct", runtime)
    assert resolve_model("smollm2-135m-instruct", runtime).path == smollm2_gguf


# ---- names -------------------------------------------------------------------------------------------------------


def test_a_name_of_the_catalogue_is_found_in_any_case(runtime, smollm2_gguf: Path) -> None:
    found = resolve_model("SmolLM2-135M-Instruct", runtime)
    assert (found.name, found.path, found.source) == ("smollm2-135m-instruct", smollm2_gguf, "wheel")


@pytest.mark.parametrize(
    ("reference", "match"),
    [("smolm2", "smollm2-135m-instruct"), ("qwen", "qwen2.5-0.5b-instruct"), ("alpca", "alpaca")],
)
def test_an_unknown_name_suggests_the_nearest(runtime, reference: str, match: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"Unknown chat model '{reference}'") as raised:
        resolve_model(reference, runtime)
    assert f"Did you mean '{match}'?" in raised.value.hint
    assert "Known: alpaca, qwen2.5-0.5b-instruct, smollm2-135m-instruct" in raised.value.hint


def test_a_name_of_the_other_kind_is_said(runtime) -> None:
    with pytest.raises(ModelNotFoundError, match="is no chat model, but one for embedding"):
        resolve_model("multilingual-e5-small", runtime)
    with pytest.raises(ModelNotFoundError, match="is no embedding model, but one for chat"):
        resolve_embedding("smollm2-135m-instruct", runtime)


def test_the_default_embedding_needs_no_hub(runtime, e5: Path) -> None:
    found = resolve_embedding(None, runtime)
    assert (found.name, found.path) == ("multilingual-e5-small", e5)


def test_an_adapter_is_a_folder_with_its_configuration(runtime, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"is no LoRA adapter: it has no adapter_config\.json"):
        resolve_adapter(str(folder), runtime)
    with pytest.raises(ModelNotFoundError, match="There is no adapter 'mine'"):
        resolve_adapter("mine", runtime)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert resolve_adapter(str(adapter), runtime).path == adapter


def test_a_gguf_file_is_no_embedding_model(runtime, smollm2_gguf: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no sentence-transformers folder"):
        resolve_embedding(str(smollm2_gguf), runtime)


# ---- hubs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`hub(url)` points both hubs' clients to a server on this machine, with caches of their own."""
    from huggingface_hub import constants

    def point(url: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))

    return point


@pytest.fixture
def silent_hub(hub) -> Iterator[None]:
    """Accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        hub(f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield


def test_a_hub_that_never_answers_is_given_up_in_time(runtime, silent_hub) -> None:
    list(builtin.register_sources())[1].load()  # the client's import is not what is measured
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"cannot be reached \(no answer within 0\.4 s\)") as raised:
        resolve_model("owner/name", runtime)
    assert time.monotonic() - started < 2 * TIMEOUT + 2.0  # both hubs, and a busy machine
    for advice in ("connection", "HF_ENDPOINT", "local folder", "smollm2-135m-instruct"):
        assert advice in raised.value.hint


def test_without_a_hub_the_default_is_the_embedded_model_with_a_notice(
    runtime, silent_hub, smollm2_gguf: Path, caplog
) -> None:
    with caplog.at_level(logging.WARNING, "calpaca"):
        found = resolve_model(None, runtime)
    assert (found.name, found.path) == ("smollm2-135m-instruct", smollm2_gguf)
    (notice,) = [record.getMessage() for record in caplog.records if record.name == "calpaca"]
    assert notice.startswith("Using smollm2-135m-instruct (very small, English only): ")
    assert len(notice) < 120


def test_offline_mode_asks_nobody(runtime, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(hubs, "probe_endpoint", lambda *_: pytest.fail("asked a hub"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError, match="switched off by HF_HUB_OFFLINE"):
        resolve_model("owner/name", runtime)


def test_a_missing_modelscope_is_advised(runtime, silent_hub, monkeypatch) -> None:
    monkeypatch.setattr(hubs, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError) as raised:
        resolve_model("owner/name", runtime)
    assert "pip install 'calpaca[modelscope]'" in raised.value.hint


class FakeHub:
    """The parts of the Hugging Face hub's interface that a snapshot needs."""

    COMMIT = "c0ffee" + "0" * 34

    def __init__(self, web) -> None:
        self.web = web
        web.files["/"] = b"hub"

    def add(self, repository: str, files: dict[str, bytes]) -> None:
        tree = [
            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for name, body in files.items()
        ]
        info = {"id": repository, "sha": self.COMMIT, "siblings": [{"rfilename": name} for name in files]}
        self._json(f"/api/models/{repository}/revision/main", info)
        self._json(f"/api/models/{repository}/tree/{self.COMMIT}", tree)
        for name, body in files.items():
            path = f"/{repository}/resolve/{self.COMMIT}/{name}"
            self.web.files[path] = body
            self.web.headers[path] = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": self.COMMIT}

    def _json(self, path: str, value: object) -> None:
        self.web.files[path] = json.dumps(value).encode()
        self.web.types[path] = "application/json"


@pytest.fixture
def fake_hub(web, hub, monkeypatch) -> FakeHub:
    hub(web.url)
    monkeypatch.setattr(hubs, "find_spec", lambda _: None)  # ModelScope's client retries for long, elsewhere too
    return FakeHub(web)


def test_only_what_is_needed_is_fetched_and_then_found_in_the_cache(runtime, fake_hub: FakeHub, monkeypatch) -> None:
    needed = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"weights",
        "1_Pooling/config.json": b"{}",
    }
    other = {
        "pytorch_model.bin": b"p",
        "onnx/model.onnx": b"o",
        "model.gguf": b"g",
        "original/params.json": b"{}",
        "a.png": b"",
    }
    fake_hub.add("owner/name", needed | other)
    found = resolve_model("owner/name", runtime, format="hf")
    assert (found.name, found.source) == ("owner/name", "huggingface")
    assert {file.relative_to(found.path).as_posix() for file in found.path.rglob("*") if file.is_file()} == set(needed)
    monkeypatch.setattr(hubs, "probe_endpoint", lambda *_: pytest.fail("asked a hub"))
    assert resolve_model("owner/name", runtime).path == found.path


def test_bin_files_are_taken_where_there_is_nothing_better(runtime, fake_hub: FakeHub) -> None:
    fake_hub.add("owner/old", {"config.json": b"{}", "pytorch_model.bin": b"weights", "training_args.bin": b"x"})
    assert {file.name for file in resolve_model("owner/old", runtime).path.iterdir()} == {
        "config.json",
        "pytorch_model.bin",
    }


def test_a_repository_without_weights_is_said(runtime, fake_hub: FakeHub) -> None:
    fake_hub.add("owner/gguf", {"model.gguf": b"g", "config.json": b"{}"})
    with pytest.raises(ModelNotFoundError, match=r"holds no weights as safetensors or \.bin"):
        resolve_model("owner/gguf", runtime)


def test_a_repository_that_is_not_there_is_said(runtime, fake_hub: FakeHub) -> None:
    with pytest.raises(UnavailableError, match="owner/none could not be fetched"):
        resolve_model("owner/none", runtime)


def test_too_little_room_for_the_default_model_is_no_reason_to_fall_back(runtime, fake_hub, monkeypatch) -> None:
    from collections import namedtuple

    from calpaca.core import disk

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(10, 10, 1_000_000))
    with pytest.raises(DownloadError, match=r"needs 999\.0 MB in .*, but 1\.0 MB are free"):
        resolve_model(None, runtime)


# ---- plugins and processes ---------------------------------------------------------------------------------------

BUCKET = """
from pathlib import Path
from calpaca.core.catalogue import Repository

class BucketSource:
    def __init__(self, settings):
        self.timeout = settings.hub_timeout
    def handles(self, origin):
        return isinstance(origin, Repository) and origin.id.startswith("bucket://")
    def cached(self, origin, revision):
        return None
    def fetch(self, origin, revision):
        return Path({folder!r}) / origin.id.removeprefix("bucket://")
"""


def test_a_plugin_adds_a_source_of_its_own(runtime, site: Path, folder: Path) -> None:
    (site / "bucket_source.py").write_text(BUCKET.format(folder=str(folder.parent)))
    runtime.sources.add(Component("bucket", "A bucket.", "bucket_source:BucketSource"), "bucket")
    found = resolve_model("bucket://my-model", runtime)
    assert (found.name, found.path, found.source) == ("bucket://my-model", folder, "bucket")


def test_the_state_of_an_entry_is_known_without_asking_anybody(runtime, smollm2_gguf: Path, own_cache: Path) -> None:
    assert find_cached(catalogue.SMOLLM2, runtime) is None
    assert Repository("a/b") not in catalogue.SMOLLM2.origins


def test_two_processes_resolving_at_once_agree(smollm2_gguf: Path) -> None:
    code = (
        "from calpaca.plugins.wiring import runtime\nfrom calpaca.core.sources import resolve_model\n"
        "print(resolve_model('smollm2-135m-instruct', runtime(), format='gguf').path)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == [str(smollm2_gguf)] * 2


def test_errors_are_all_of_one_tree() -> None:
    assert issubclass(UnavailableError, CalpacaError)
    assert UnavailableError.exit_code == 3
