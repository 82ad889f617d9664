"""What will be written, decided before a byte is: tensors, how they are made, and the files they go to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from calpaca.core.checkpoint.dtypes import SIZES
from calpaca.core.checkpoint.manifest import Lineage

if TYPE_CHECKING:
    import torch

    from calpaca.core.checkpoint.reader import Checkpoint
    from calpaca.core.checkpoint.tensor import StoredTensor

Container = Literal["safetensors", "torch", "gguf"]
Buffer = bytes | memoryview

SHARD_SIZE = 5_000_000_000
"""Bytes of a file of weights, unless it is asked for otherwise."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written. `chunks` makes its bytes, row by row and little-endian, when its turn comes.

    `origin` says in words where it comes from; `memory` is what making it needs beside the result's own bytes.
    `copy_of` is the stored tensor whose bytes these are, where nothing is changed: some of its rows can then be read
    alone. `packed` counts the bytes where a GGUF type packs several elements into one block.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Buffer]]
    origin: str
    memory: int = 0
    copy_of: StoredTensor | None = None
    packed: int | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * SIZES[self.dtype] if self.packed is None else self.packed


def copied(source: Checkpoint, name: str, new_name: str | None = None) -> PlannedTensor:
    """The tensor of `source` called `name`, byte by byte."""
    stored = source.tensors[name]
    return PlannedTensor(
        new_name or name,
        stored.dtype,
        stored.shape,
        lambda: source.chunks(name),
        f"{stored.file.name}: {name}",
        copy_of=stored,
    )


def computed(
    name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor], *, origin: str, memory: int = 0
) -> PlannedTensor:
    """A tensor that `make` returns whole, with the dtype and shape that are announced here."""
    return PlannedTensor(name, dtype, shape, lambda: map(buffer_of, [make()]), origin, memory)


def buffer_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, row by row, without a copy where it lies that way already."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return bytes_of(flat.view(torch.uint8))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes on the CPU, to be read or written in place."""
    return memoryview(cast("bytearray", tensor.numpy()))


@dataclass(frozen=True)
class PlannedFile:
    """A file of weights and the tensors in it, in order. `header` is what stands before them in a GGUF file."""

    name: str
    container: Container
    tensors: tuple[PlannedTensor, ...]
    header: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of its tensors; the header adds a little."""
        return sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True)
class ModelPlan:
    """A folder to be written: files of weights, and small files (`texts`: name to contents, or a path to copy).

    `lineage` is called once, while the weights are written, since it may hash the inputs. `inputs` are the files that
    the tensors are made from and `settings` what decides how (JSON values): an interrupted run goes on only when
    both are what they were. `check` is given the finished folder before it gets its name; when it raises, nothing is
    kept.
    """

    files: tuple[PlannedFile, ...]
    lineage: Callable[[], Lineage]
    inputs: tuple[Path, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, bytes | Path] = field(default_factory=dict)
    check: Callable[[Path], object] | None = None

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        return (tensor for file in self.files for tensor in file.tensors)

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(file.size for file in self.files)

    @property
    def memory(self) -> int:
        """Bytes that the largest tensor in work needs, beside what the program itself takes."""
        return max((3 * tensor.size + tensor.memory for tensor in self.tensors if tensor.memory), default=0)


def hugging_face_files(
    tensors: Sequence[PlannedTensor], container: Container = "safetensors", shard_size: int = SHARD_SIZE
) -> tuple[PlannedFile, ...]:
    """Tensors in files of at most `shard_size` bytes (a larger tensor gets one alone), named as transformers does."""
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.size
    stem, suffix = ("model", "safetensors") if container == "safetensors" else ("pytorch_model", "bin")
    if len(groups) == 1:
        return (PlannedFile(f"{stem}.{suffix}", container, tuple(groups[0])),)
    return tuple(
        PlannedFile(f"{stem}-{number:05}-of-{len(groups):05}.{suffix}", container, tuple(group))
        for number, group in enumerate(groups, 1)
    )


def shared_names(files: Sequence[PlannedFile]) -> set[str]:
    """Tensor names that several files have, as the parts of an original LLaMA checkpoint do."""
    counts = Counter(tensor.name for file in files for tensor in file.tensors)
    return {name for name, count in counts.items() if count > 1}


def index_of(files: Sequence[PlannedFile]) -> dict[str, dict[str, Any]]:
    """The index that goes beside several files: its name and contents; empty for a single file, and for parts."""
    if len(files) == 1 or shared_names(files):
        return {}
    name = "model.safetensors.index.json" if files[0].container == "safetensors" else "pytorch_model.bin.index.json"
    return {
        name: {
            "metadata": {"total_size": sum(file.size for file in files)},
            "weight_map": {tensor.name: file.name for file in files for tensor in file.tensors},
        }
    }
