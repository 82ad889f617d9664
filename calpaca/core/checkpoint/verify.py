"""Checking files against what is written about them: a manifest, a manifest of the same weights elsewhere, or a
published list of sha256 sums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from calpaca.core.checkpoint.lineage import tensor_records
from calpaca.core.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    TensorRecord,
    parse_manifest,
    read_manifest,
)
from calpaca.core.checkpoint.reader import Checkpoint, open_checkpoint, read_file
from calpaca.core.errors import CorruptFileError, ModelNotFoundError, UsageError
from calpaca.core.fingerprint import file_digest

_SUM = re.compile(r"\\?(?P<digest>[0-9a-fA-F]{64})[ \t]+\*?(?P<name>.+)")
"""A line of `sha256sum`: digest, two spaces (or space and asterisk), name."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: in which file, in which of its tensors, and what."""

    file: str
    problem: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification:
    """What was compared, and what was found. `against` says with what."""

    against: str
    files: int
    tensors: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not self.findings


def verify(path: Path, against: Path | None = None) -> Verification:
    """Read every byte of a model folder or file and compare its digests; no remembered digest is trusted.

    Without `against` the folder's own manifest is taken. `against` may be a list in the form of `sha256sum`, or a
    manifest (or a folder with one) of the same weights in any container, whose tensors are then compared; those of an
    original LLaMA checkpoint are compared as what they are at Hugging Face.
    Raises ModelNotFoundError or UsageError when there is nothing to compare with.
    """
    if against is None:
        return _by_manifest(path, _own_manifest(path))
    if against.is_dir() or against.name == MANIFEST or against.suffix == ".json":
        return _by_tensors(path, _own_manifest(against) if against.is_dir() else parse_manifest(against))
    return _by_list(path, against)


def _own_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is no folder.", "Name a model folder that calpaca wrote.")
    manifest = read_manifest(folder)
    if manifest is None:
        raise ModelNotFoundError(
            f"{folder} has no {MANIFEST}, so there is nothing to compare it with.",
            "Name a list of sha256 sums, or another folder of the same weights, with --against.",
        )
    return manifest


def _by_manifest(folder: Path, manifest: Manifest) -> Verification:
    findings: list[Finding] = []
    for name, record in manifest.files.items():
        file = folder / name
        if not file.is_file():
            findings.append(Finding(name, "is missing"))
        elif file_digest(file, use_memo=False) != record.sha256:
            size = file.stat().st_size
            length = "" if size == record.size else f" (it has {size:,} bytes instead of {record.size:,})"
            tensors = {each: told for each, told in manifest.tensors.items() if told.file == name}
            findings.append(Finding(name, f"was changed{length}", tuple(_changed(file, tensors))))
    return Verification(f"its {MANIFEST}", len(manifest.files), len(manifest.tensors), tuple(findings))


def _changed(file: Path, told: Mapping[str, TensorRecord]) -> Iterator[str]:
    """Names of the tensors of a file whose bytes are not what was told; none when its header cannot be read."""
    if not told:
        return
    try:
        digests = _digests(file)
    except (CorruptFileError, ModelNotFoundError):
        return
    for name, record in told.items():
        if digests.get(name.removeprefix(f"{record.file}/")) != record.sha256:
            yield name


def _digests(file: Path) -> dict[str, str]:
    """sha256 of the bytes of every tensor of a file; a GGUF file's as they are packed there."""
    if file.suffix != ".gguf":
        checkpoint = Checkpoint(file, read_file(file))
        return {name: record.sha256 for name, record in tensor_records(checkpoint).items()}
    from calpaca.core.gguf import spans

    with file.open("rb") as opened:
        digests = {}
        for name, (start, size) in spans(file).items():
            opened.seek(start)
            digests[name] = hashlib.sha256(opened.read(size)).hexdigest()
    return digests


def _by_tensors(path: Path, manifest: Manifest) -> Verification:
    """Compare tensors alone: names, dtypes, shapes and bytes, whatever files they lie in."""
    records = _records(path, manifest)
    findings = [
        Finding(record.file, "holds tensors that the manifest does not know", (name,))
        for name, record in records.items()
        if name not in manifest.tensors
    ]
    for name, told in manifest.tensors.items():
        record = records.get(name)
        if record is None:
            findings.append(Finding(path.name, "lacks a tensor", (name,)))
        elif (record.dtype, record.shape) != (told.dtype, told.shape):
            problem = f"has {record.dtype} {list(record.shape)} instead of {told.dtype} {list(told.shape)}"
            findings.append(Finding(record.file, problem, (name,)))
        elif record.sha256 != told.sha256:
            findings.append(Finding(record.file, "has other values", (name,)))
    return Verification("a manifest of the same weights", 0, len(manifest.tensors), tuple(findings))


def _records(path: Path, manifest: Manifest) -> dict[str, TensorRecord]:
    """The tensors of a model; those of original `.pth` parts joined, under the names that the manifest has."""
    from calpaca.core.convert.digests import original_records
    from calpaca.core.convert.source import is_original

    if not is_original(path):
        return tensor_records(open_checkpoint(path))
    return original_records(path, tied="lm_head.weight" not in manifest.tensors)


def _by_list(path: Path, listing: Path) -> Verification:
    sums = _read_sums(listing)
    folder = path if path.is_dir() else path.parent
    if path.is_file():
        if path.name not in sums:
            raise UsageError(f"{listing} has no line for {path.name}.", f"It lists: {', '.join(sums)}.")
        sums = {path.name: sums[path.name]}
    findings = []
    for name, digest in sums.items():
        file = next((each for each in (folder / name, folder / Path(name).name) if each.is_file()), None)
        if file is None:
            findings.append(Finding(name, "is missing"))
        elif (found := file_digest(file, use_memo=False)) != digest:
            findings.append(Finding(name, f"has sha256 {found} instead of {digest}{_caveat(file)}"))
    return Verification(listing.name, len(sums), 0, tuple(findings))


def _caveat(file: Path) -> str:
    if file.suffix not in {".pth", ".bin"}:
        return ""
    return "; such a file's sum also changes with the PyTorch that wrote it, compare tensors to be sure"


def _read_sums(listing: Path) -> dict[str, str]:
    """Name to digest. Raises UsageError for a file that is no such list, naming the line."""
    try:
        lines = listing.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{listing} cannot be read: {error}.", "Name a list of sha256 sums or a manifest.") from error
    sums = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _SUM.fullmatch(line.strip())
        if match is None:
            raise UsageError(
                f"Line {number} of {listing} is no sha256 sum: {line[:60]!r}.",
                "Each line is: digest, spaces, file name.",
            )
        sums[match["name"]] = match["digest"].lower()
    if not sums:
        raise UsageError(f"{listing} lists nothing.", "Each line is: digest, spaces, file name.")
    return sums
