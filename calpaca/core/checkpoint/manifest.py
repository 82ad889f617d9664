"""The manifest beside written weights: what every byte is, and what it was made of.

`calpaca-manifest.json` lists sha256 of each file and of each tensor's bytes. A tensor's digest does not depend on the
container, so the same weights as safetensors, `.bin` and `.pth` have the same digests, and one digest over all of
them, `weights`, names the weights wherever they lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calpaca.core.errors import CorruptFileError

MANIFEST = "calpaca-manifest.json"
CONTEXT_LENGTH = "context_length"
"""A setting in the lineage of what is written as `.pth`: `params.json` cannot say it."""
_FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """`size` in bytes."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """`dtype` is a code of safetensors; `sha256` is over the elements, row by row, little-endian."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Input:
    """Something a model was made of: `role` is `base` or `adapter`.

    `weights` is the digest over its tensors, `fingerprint` the one over its files. `made_of` are the inputs that its
    own manifest names, so that lineage reaches back to the first base.
    """

    role: str
    name: str
    fingerprint: str
    weights: str
    scale: float = 1.0
    config: Mapping[str, Any] = field(default_factory=dict)
    made_of: tuple[Input, ...] = ()

    def every(self) -> tuple[Input, ...]:
        """This input and everything it was made of."""
        return (self, *(deeper for each in self.made_of for deeper in each.every()))


@dataclass(frozen=True)
class Lineage:
    """How weights came about: `operation` is `merge`, `convert`, …; `settings` are the arguments that matter."""

    operation: str
    inputs: tuple[Input, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    """sha256 of the chat template."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def every(self) -> tuple[Input, ...]:
        """All inputs, and what they were made of."""
        return tuple(deeper for each in self.inputs for deeper in each.every())


@dataclass(frozen=True)
class Manifest:
    """What is written as JSON: files and tensors by name."""

    lineage: Lineage
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, TensorRecord]

    @property
    def weights(self) -> str:
        """The digest over all tensors."""
        return weights_digest(self.tensors)

    def to_json(self) -> str:
        content = {"format": _FORMAT, "weights": self.weights, **asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def record_name(file: str, name: str, shared: set[str]) -> str:
    """The name that a manifest lists a tensor by: where several files have one of the name, the file's before it."""
    return f"{file}/{name}" if name in shared else name


def weights_digest(tensors: Mapping[str, TensorRecord]) -> str:
    """sha256 over name, dtype, shape and digest of every tensor, in the order of their names."""
    lines = [
        f"{name} {record.dtype} {'x'.join(map(str, record.shape))} {record.sha256}\n"
        for name, record in sorted(tensors.items())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None when it has none. Raises CorruptFileError for a damaged one."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    return parse_manifest(file)


def parse_manifest(file: Path) -> Manifest:
    """Read a manifest's file. Raises CorruptFileError when it is none, or was changed by hand."""
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
        manifest = Manifest(
            lineage=_lineage(content["lineage"]),
            files={name: FileRecord(**record) for name, record in content["files"].items()},
            tensors={name: read_record(record) for name, record in content["tensors"].items()},
        )
        stated = content["weights"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{file} is no readable manifest: {error}.", "Take the original file.") from error
    if stated != manifest.weights:
        raise CorruptFileError(
            f"{file} was changed: the digest over its tensors is not the one it states.", "Take the original file."
        )
    return manifest


def read_record(content: Mapping[str, Any]) -> TensorRecord:
    """A tensor's record from its JSON values."""
    return TensorRecord(**{**content, "shape": tuple(content["shape"])})


def _lineage(content: Mapping[str, Any]) -> Lineage:
    return Lineage(**{**content, "inputs": tuple(map(_input, content["inputs"]))})


def _input(content: Mapping[str, Any]) -> Input:
    return Input(**{**content, "made_of": tuple(map(_input, content["made_of"]))})
