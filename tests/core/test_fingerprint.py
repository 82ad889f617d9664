"""Fingerprints of files and model folders."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from calpaca.core import fingerprint as module
from calpaca.core.errors import ModelNotFoundError
from calpaca.core.fingerprint import file_digest, fingerprint


def _model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def settled(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memo's file, with files remembered however young they are."""
    monkeypatch.setattr(module, "_SETTLED", -1.0)
    return own_cache / "fingerprints.sqlite"


def test_the_same_contents_have_one_fingerprint_wherever_they_lie(tmp_path: Path) -> None:
    assert fingerprint(_model(tmp_path / "a")) == fingerprint(_model(tmp_path / "deep" / "b"))


@pytest.mark.parametrize(
    "name", ["README.md", "optimizer.pt", "trainer_state.json", ".cache.json", "checkpoint-5/x.bin"]
)
def test_what_does_not_change_the_model_does_not_change_the_fingerprint(tmp_path: Path, name: str) -> None:
    folder = _model(tmp_path / "a")
    before = fingerprint(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("more")
    assert fingerprint(folder) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model", "vocab.txt"])
def test_every_file_of_the_model_counts(tmp_path: Path, name: str) -> None:
    folder = _model(tmp_path / "a")
    before = fingerprint(folder)
    (folder / name).write_text("other")
    assert fingerprint(folder) != before


def test_the_name_of_a_file_counts(tmp_path: Path) -> None:
    one, two = _model(tmp_path / "a"), _model(tmp_path / "b")
    (two / "model.safetensors").rename(two / "other.safetensors")
    assert fingerprint(one) != fingerprint(two)


def test_modules_of_sentence_transformers_count(tmp_path: Path) -> None:
    folder = _model(tmp_path / "a")
    (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"mean": true}')
    before = fingerprint(folder)
    (folder / "1_Pooling" / "config.json").write_text('{"mean": false}')
    assert fingerprint(folder) != before


def test_a_digest_is_remembered_and_verification_ignores_that(tmp_path: Path, settled: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"abc")
    real = hashlib.sha256(b"abc").hexdigest()
    assert file_digest(file) == real
    with closing(sqlite3.connect(settled)) as memo, memo:
        memo.execute("UPDATE digests SET sha256 = 'remembered'")
    assert file_digest(file) == "remembered"
    assert file_digest(file, use_memo=False) == real


def test_a_change_with_the_time_put_back_is_seen(tmp_path: Path, settled: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"abc")
    status = file.stat()
    before = file_digest(file)
    file.write_bytes(b"abd")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digest(file) != before


def test_a_young_file_is_not_remembered(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"abc")
    file_digest(file)
    with closing(sqlite3.connect(own_cache / "fingerprints.sqlite")) as memo:
        assert memo.execute("SELECT count(*) FROM digests").fetchone() == (0,)


def test_the_hubs_cache_is_taken_at_its_word_except_by_verification(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"abc")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert file_digest(link) == "ab" * 32
    assert file_digest(link, use_memo=False) == hashlib.sha256(b"abc").hexdigest()


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "file" / "cache"))
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"no folder").hexdigest()


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        fingerprint(tmp_path / "nothing")
    with pytest.raises(ModelNotFoundError, match="holds no model files"):
        fingerprint(tmp_path)
