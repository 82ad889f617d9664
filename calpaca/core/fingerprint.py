"""Fingerprints: sha256 over the contents of a file or model folder, wherever it lies and whatever it is called.

Hashing gigabytes takes seconds, so a file's digest is remembered by device, inode, size and both times (a change that
puts the modification time back still moves ctime), and taken from the hub's own cache where its name is the digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from calpaca.core.checkpoint.manifest import MANIFEST
from calpaca.core.errors import CorruptFileError, ModelNotFoundError
from calpaca.core.paths import cache_dir

_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".json", ".model", ".jinja", ".tiktoken", ".py"}
_TEXTS = {"vocab.txt", "merges.txt"}
# What training leaves beside the weights says nothing about what the model computes.
_TRAINING = re.compile(r"optimizer.*|scheduler.*|scaler.*|rng_state.*|trainer_state.*|training_args.*|all_results.*")
_SETTLED = 2.0  # seconds: a younger file may change again within the clock's resolution
_SCHEMA = """CREATE TABLE IF NOT EXISTS digests (
    device TEXT, inode TEXT, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, sha256 TEXT, PRIMARY KEY (device, inode)
);
CREATE TABLE IF NOT EXISTS weights (fingerprint TEXT PRIMARY KEY, sha256 TEXT);
"""


def file_digest(path: Path, *, use_memo: bool = True) -> str:
    """sha256 of a file, as 64 hexadecimal digits.

    `use_memo=False` reads every byte, whatever is remembered. Raises ModelNotFoundError when the file cannot be read.
    """
    try:
        known = (_hub_digest(path) or _recall(path)) if use_memo else None
        return known or _hash(path)
    except OSError as error:
        raise ModelNotFoundError(
            f"{path} cannot be read: {error.strerror or error}.", "Check the path and its permissions."
        ) from error


def remember_digest(path: Path, digest: str) -> None:
    """Keep the sha256 of a file that this process has just written, and that nobody else knows of yet."""
    with suppress(OSError):
        _remember(path.stat(), digest)


def fingerprint(path: Path, *, use_memo: bool = True) -> str:
    """Digest of a weights file, or of a folder's weights, configuration and tokenizer with their relative names.

    Raises ModelNotFoundError when there is nothing of that kind.
    """
    if not path.is_dir():
        return file_digest(path, use_memo=use_memo)
    files = model_files(path)
    if not files:
        raise ModelNotFoundError(f"{path} holds no model files.", "Name the folder that config.json lies in.")
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda file: file_digest(file, use_memo=use_memo), files))
    lines = [f"{file.relative_to(path).as_posix()} {digest}\n" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files that make a model: those of the folder itself and of the modules a modules.json names, sorted."""
    folders = {folder, *_module_folders(folder)}
    files = (file for each in folders if each.is_dir() for file in each.iterdir())
    return sorted(file for file in files if _belongs(file))


def _belongs(file: Path) -> bool:
    kind = file.suffix in _SUFFIXES or file.name in _TEXTS
    kind = kind and file.name != MANIFEST  # when and how it was made changes nothing that it computes
    return kind and not file.name.startswith(".") and not _TRAINING.fullmatch(file.name) and file.is_file()


def _module_folders(folder: Path) -> list[Path]:
    """Folders of a sentence-transformers model's modules (pooling, dense layers)."""
    listing = folder / "modules.json"
    if not listing.is_file():
        return []
    try:
        return [folder / str(module["path"]) for module in json.loads(listing.read_text("utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptFileError(f"{listing} is no list of modules: {error}.", "Fetch the model again.") from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if _identity(before) == _identity(after) and time.time() - max(after.st_mtime, after.st_ctime) >= _SETTLED:
        _remember(after, digest)
    return digest


def _hub_digest(path: Path) -> str | None:
    """The digest that a file of the Hugging Face cache is named by: snapshots link to `blobs/<sha256>`."""
    if not path.is_symlink():
        return None
    blob = path.resolve(strict=True)
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def _identity(status: os.stat_result) -> tuple[str, str, int, int, int]:
    # Device and inode may exceed SQLite's 64-bit integers on some file systems.
    return str(status.st_dev), str(status.st_ino), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _recall(path: Path) -> str | None:
    query = "SELECT sha256 FROM digests WHERE device = ? AND inode = ? AND size = ? AND mtime_ns = ? AND ctime_ns = ?"
    identity = _identity(path.stat())
    with suppress(sqlite3.Error, OSError), _memo() as memo:
        row = memo.execute(query, identity).fetchone()
        return str(row[0]) if row else None
    return None


def _remember(status: os.stat_result, digest: str) -> None:
    # A memo that cannot be written (read-only cache, full disk) costs time, not correctness.
    with suppress(sqlite3.Error, OSError), _memo() as memo:
        memo.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?)", (*_identity(status), digest))


def recall_weights(print_of_files: str) -> str | None:
    """The digest over all tensors of the files with this fingerprint, if `remember_weights` was told."""
    with suppress(sqlite3.Error, OSError), _memo() as memo:
        row = memo.execute("SELECT sha256 FROM weights WHERE fingerprint = ?", (print_of_files,)).fetchone()
        return str(row[0]) if row else None
    return None


def remember_weights(print_of_files: str, digest: str) -> None:
    with suppress(sqlite3.Error, OSError), _memo() as memo:
        memo.execute("INSERT OR REPLACE INTO weights VALUES (?, ?)", (print_of_files, digest))


@contextmanager
def _memo() -> Iterator[sqlite3.Connection]:
    file = cache_dir() / "fingerprints.sqlite"
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file, timeout=5.0)) as connection, connection:
        connection.executescript(_SCHEMA)
        yield connection
