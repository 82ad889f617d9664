"""Where weights come from: the inputs of a plan, described so that they are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import calpaca
from calpaca.core.checkpoint.manifest import Input, TensorRecord, read_manifest, weights_digest
from calpaca.core.checkpoint.reader import Checkpoint, open_checkpoint
from calpaca.core.fingerprint import file_digest, fingerprint, recall_weights, remember_weights

_LIBRARIES = ("torch", "transformers", "peft", "safetensors", "gguf")


def input_of(role: str, name: str, path: Path, *, scale: float = 1.0, config: Mapping[str, Any] | None = None) -> Input:
    """Describe a model or adapter folder. Hashes its files where their digests are not remembered.

    `weights` is empty where nobody has asked for that digest yet: it takes reading everything once more.
    """
    manifest = read_manifest(path)
    return Input(
        role=role,
        name=name,
        fingerprint=fingerprint(path),
        weights=known_weights(path) or "",
        scale=scale,
        config=dict(config or {}),
        made_of=manifest.lineage.inputs if manifest is not None else (),
    )


def versions() -> dict[str, str]:
    """Versions of calpaca and of the libraries that the numbers may depend on, those that are installed."""
    found = {"calpaca": calpaca.__version__}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def known_weights(path: Path) -> str | None:
    """The digest over all tensors of a folder if it is stated by a manifest that fits the files, or remembered."""
    manifest = read_manifest(path)
    if (
        manifest is not None
        and manifest.tensors
        and all(
            (path / name).is_file() and file_digest(path / name) == record.sha256
            for name, record in manifest.files.items()
            if name in {tensor.file for tensor in manifest.tensors.values()}
        )
    ):
        return manifest.weights
    return recall_weights(fingerprint(path))


def find_weights(path: Path) -> str:
    """The digest over all tensors of a folder or file, which may mean reading all of it."""
    known = known_weights(path)
    if known is None:
        known = weights_digest(tensor_records(open_checkpoint(path)))
        remember_weights(fingerprint(path), known)
    return known


def contains(model: Path, adapter: Path) -> bool:
    """Whether a model's manifest says that an adapter was merged into it. Without a manifest nothing is hashed."""
    manifest = read_manifest(model)
    merged = [each for each in manifest.lineage.every() if each.role == "adapter"] if manifest is not None else []
    return bool(merged) and find_weights(adapter) in {each.weights for each in merged}


def tensor_records(checkpoint: Checkpoint) -> dict[str, TensorRecord]:
    """The record of every tensor, by reading all of them once."""
    names = list(checkpoint.tensors)
    with ThreadPoolExecutor(2) as pool:  # hashing releases Python's lock
        digests = pool.map(lambda name: _tensor_digest(checkpoint, name), names)
        return {
            name: TensorRecord(stored.file.name, stored.dtype, stored.shape, digest)
            for name, digest in zip(names, digests, strict=True)
            for stored in [checkpoint.tensors[name]]
        }


def _tensor_digest(checkpoint: Checkpoint, name: str) -> str:
    digest = hashlib.sha256()
    for chunk in checkpoint.chunks(name):
        digest.update(chunk)
    return digest.hexdigest()
