"""Opening a checkpoint: a folder or file of any kind gives its tensors by name, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from calpaca.core.checkpoint import safetensors, torch_zip
from calpaca.core.checkpoint.dtypes import to_torch
from calpaca.core.checkpoint.memory import Memory
from calpaca.core.checkpoint.plan import buffer_of
from calpaca.core.checkpoint.tensor import StoredTensor
from calpaca.core.errors import CorruptFileError, ModelNotFoundError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 4 << 20
"""Bytes that are read at a time."""

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, in the order of the files. Nothing is read before it is asked for."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    _memory: Memory = field(default_factory=Memory, init=False, repr=False, compare=False)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, row by row, at most `CHUNK` at a time. Raises CorruptFileError when they end early.

        The memory of a chunk is used again once nothing refers to the chunk.
        """
        stored = self.tensors[name]
        if stored.strides is not None:
            yield buffer_of(self.read(name))
            return
        left = stored.size
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            while left:
                chunk = self._memory(min(CHUNK, left))
                count = file.readinto(chunk)
                if not count:
                    raise _ends_early(stored)
                left -= count
                yield chunk[:count]
                del chunk  # before the next is asked for

    def read(self, name: str, memory: Memory | None = None) -> Tensor:
        """A tensor on the CPU, in memory of its own or lent by `memory`. Raises CorruptFileError when its bytes end
        early."""
        import torch

        stored = self.tensors[name]
        dtype = to_torch(stored.dtype)
        reach = stored.elements if stored.strides is None else _reach(stored)
        if not reach:
            return torch.empty(stored.shape, dtype=dtype)
        view = (memory or Memory())(reach * dtype.itemsize)
        flat = torch.frombuffer(view, dtype=dtype)
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise _ends_early(stored)
                view = view[count:]
        if stored.strides is None:
            return flat.reshape(stored.shape)
        return flat.as_strided(stored.shape, stored.strides).contiguous()


def open_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a model folder, an adapter folder, or a `.safetensors`, `.bin` or `.pth` file.

    Raises ModelNotFoundError when there are none, CorruptFileError when a file is damaged, missing or at odds with
    the index, and for pickled code, which is refused and never run.
    """
    if path.is_file():
        return Checkpoint(path, read_file(path))
    index = next((path / name for name in _INDEXES if (path / name).is_file()), None)
    if index is not None:
        return Checkpoint(path, _indexed(index))
    single = next((path / name for name in _SINGLE if (path / name).is_file()), None)
    files = [single] if single is not None else _matching(path)
    if not files:
        raise _no_weights(path)
    return Checkpoint(path, _joined(files))


def _no_weights(path: Path) -> ModelNotFoundError:
    if any(path.glob("consolidated.*.pth")):
        return ModelNotFoundError(
            f"{path} is an original LLaMA checkpoint (.pth), no Hugging Face folder.",
            f"Convert it: calpaca models convert {path} --output DIR",
        )
    return ModelNotFoundError(
        f"{path} holds no weights (*.safetensors, pytorch_model*.bin).", "Name a model or adapter folder."
    )


def read_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, in order."""
    return safetensors.read_tensors(file) if file.suffix == ".safetensors" else torch_zip.read_tensors(file)


def _matching(folder: Path) -> list[Path]:
    for pattern in _PATTERNS:
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _joined(files: Sequence[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, stored in read_file(file).items():
            if name in tensors:
                raise CorruptFileError(
                    f"{name} is in {tensors[name].file.name} and in {file.name}.",
                    "Remove the file that does not belong to the model.",
                )
            tensors[name] = stored
    return tensors


def _indexed(index: Path) -> dict[str, StoredTensor]:
    """Tensors of the files that an index names; both must say the same."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{index} is no index of weights: {error}.", "Fetch the file again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CorruptFileError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} files that its index names: {_few(missing)}.",
            "Fetch them again.",
        )
    tensors = _joined([index.parent / name for name in names])
    wrong = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    unlisted = [name for name in tensors if name not in weight_map]
    if wrong or unlisted:
        raise CorruptFileError(
            f"{index.name} does not fit the files beside it: {len(wrong)} tensors are not where it says and"
            f" {len(unlisted)} are not listed ({_few(wrong or unlisted)}).",
            "Fetch the index and all files again, from one place.",
        )
    return tensors


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(islice(names, 3))
    return shown if len(names) <= 3 else f"{shown}, …"


def _reach(stored: StoredTensor) -> int:
    """Elements from a tensor's first one to its last, as they lie in the file."""
    assert stored.strides is not None
    if not stored.elements:
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(stored.shape, stored.strides, strict=True))


def _ends_early(stored: StoredTensor) -> CorruptFileError:
    return CorruptFileError(f"{stored.file} ends inside {stored.name}.", "Fetch the file again.")
