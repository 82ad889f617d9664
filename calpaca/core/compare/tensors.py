"""Tensors of two checkpoints: which are the same, which differ, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calpaca.core.checkpoint.lineage import known_weights, tensor_records
from calpaca.core.checkpoint.manifest import TensorRecord, read_manifest
from calpaca.core.checkpoint.reader import Checkpoint, open_checkpoint
from calpaca.core.checkpoint.tensor import StoredTensor

NOTHING = "nothing"
"""What a side has that lacks a tensor."""

_BLOCK = 1 << 22  # elements that are compared at a time


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs: `a` and `b` say what each side has (dtype and shape, `nothing`).

    `largest` is the greatest difference of two elements where the shapes are the same; NaN where a value is NaN.
    """

    name: str
    a: str
    b: str
    largest: float | None = None


@dataclass(frozen=True)
class TensorComparison:
    """How many tensors have the same name, dtype, shape and bytes, and those that do not."""

    equal: int
    differences: tuple[TensorDifference, ...]


def compare_tensors(a: Path, b: Path) -> TensorComparison:
    """Compare folders or files of weights by reading each once; tensors that differ are read again, two at a time.

    Raises ModelNotFoundError where there are no weights, CorruptFileError for damaged files.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    records = _records(a, left), _records(b, right)
    differences = []
    for name in dict.fromkeys([*left.tensors, *right.tensors]):
        sides = [each.get(name) for each in records]
        if not _same(*sides):
            differences.append(_difference(name, left, right))
    return TensorComparison(len(left.tensors.keys() & right.tensors.keys()) - _shared(differences), tuple(differences))


def _shared(differences: list[TensorDifference]) -> int:
    return sum(NOTHING not in (each.a, each.b) for each in differences)


def _records(path: Path, checkpoint: Checkpoint) -> Mapping[str, TensorRecord]:
    """From the manifest where the files are still those it was written with, else by reading them."""
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest is not None and known_weights(path) == manifest.weights:
        return manifest.tensors
    return tensor_records(checkpoint)


def _same(a: TensorRecord | None, b: TensorRecord | None) -> bool:
    return a is not None and b is not None and (a.dtype, a.shape, a.sha256) == (b.dtype, b.shape, b.sha256)


def _difference(name: str, a: Checkpoint, b: Checkpoint) -> TensorDifference:
    left, right = a.tensors.get(name), b.tensors.get(name)
    same_shape = left is not None and right is not None and left.shape == right.shape
    return TensorDifference(
        name, _described(left), _described(right), largest=_largest(name, a, b) if same_shape else None
    )


def _described(stored: StoredTensor | None) -> str:
    return f"{stored.dtype} {list(stored.shape)}" if stored is not None else NOTHING


def _largest(name: str, a: Checkpoint, b: Checkpoint) -> float:
    import torch

    left, right = a.read(name).reshape(-1), b.read(name).reshape(-1)
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(left), _BLOCK)]
    differences = [(left[block].double() - right[block].double()).abs().max() for block in blocks]
    return torch.stack(differences).max().item() if differences else 0.0  # unlike Python's max, it keeps NaN
