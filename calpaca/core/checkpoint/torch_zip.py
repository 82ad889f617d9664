"""The container of `torch.save`, for `.bin` and `.pth` files: read without running code, written tensor by tensor.

Such a file is an uncompressed zip archive: a pickle that describes the tensors, then one member of raw bytes for each
storage. The description gives the place of every tensor; the bytes are then read like those of any other file.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from calpaca.core.checkpoint.dtypes import SIZES
from calpaca.core.checkpoint.plan import PlannedTensor
from calpaca.core.checkpoint.stream import FileStream
from calpaca.core.checkpoint.tensor import StoredTensor
from calpaca.core.checkpoint.torch_pickle import DescribedTensor, PickledCode, read_state, write_state
from calpaca.core.errors import CorruptFileError, ModelNotFoundError, UnsupportedError

_ROOT = "archive"
_ALIGNMENT = 64  # bytes; torch's own
_LOCAL_HEADER, _ZIP64_FIELD = 30, 20  # bytes before a member's name, and of the extra field that Python adds
_DAMAGES = (
    EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, pickle.UnpicklingError,
    zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class _Member:
    """Where the bytes of a storage begin in the file, and how many they are."""

    offset: int
    size: int


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, without its bytes. Pickled code is refused, never run.

    Raises CorruptFileError for a damaged file or one with code in it, UnsupportedError for other contents.
    """
    with _reported(file), zipfile.ZipFile(file) as archive:
        described, members = _description(archive)
        _check_contents(file, described)
        return {name: _stored(str(name), tensor, file, members) for name, tensor in described.items()}


@contextmanager
def _reported(file: Path) -> Iterator[None]:
    """Turn what reading a damaged or dangerous file raises into errors that name it."""
    if not file.is_file():
        raise ModelNotFoundError(f"{file} does not exist.", "Check the path.")
    if not zipfile.is_zipfile(file):
        raise CorruptFileError(
            f"{file} ({file.stat().st_size:,} bytes) is truncated, or was saved by a PyTorch older than 1.6.",
            "Fetch the file again, or load it with torch.load and save it again.",
        )
    try:
        yield
    except PickledCode as error:
        raise CorruptFileError(
            f"{file} holds code instead of tensors; it was not run: {error}.",
            "Take a safetensors version of the weights.",
        ) from error
    except (*_DAMAGES, OSError) as error:
        raise CorruptFileError(f"{file} is damaged: {error}.", "Fetch the file again.") from error


def _description(archive: zipfile.ZipFile) -> tuple[Any, dict[str, _Member]]:
    """What was pickled, and the members with the storages' bytes by key."""
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    root = names[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("its numbers lie with the highest byte first")
    data = f"{root}data/"
    members = {
        info.filename.removeprefix(data): _member(archive, info)
        for info in archive.infolist()
        if info.filename.startswith(data)
    }
    return read_state(archive.read(names[0])), members


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    """A member's bytes begin after its local header, name and extra field."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its members are compressed")
    file = archive.fp
    assert file is not None
    file.seek(info.header_offset + _LOCAL_HEADER - 4)
    name, extra = struct.unpack("<2H", file.read(4))
    return _Member(info.header_offset + _LOCAL_HEADER + name + extra, info.file_size)


def _check_contents(file: Path, described: Any) -> None:
    if not isinstance(described, dict):
        raise UnsupportedError(f"{file} holds no tensors by name.", "Name a file that holds a model's state dict.")
    for name, value in described.items():
        if not isinstance(value, DescribedTensor):
            raise UnsupportedError(
                f"{file} holds {type(value).__name__} under '{name}' where a tensor is expected.",
                "Name a file that holds a model's tensors alone (a state dict).",
            )


def _stored(name: str, tensor: DescribedTensor, file: Path, members: Mapping[str, _Member]) -> StoredTensor:
    member = members[tensor.storage.key]
    if tensor.reach > member.size or min((tensor.offset, *tensor.shape, *tensor.strides)) < 0:
        raise ValueError(f"{name} reaches beyond its storage")
    return StoredTensor(
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        file=file,
        offset=member.offset + tensor.offset * SIZES[tensor.dtype],
        strides=None if tensor.is_contiguous else tensor.strides,
    )


def write(stream: FileStream, tensors: Sequence[PlannedTensor]) -> None:
    """Write a whole file. The checksums in the archive are those of the bytes, so that any zip reader accepts it."""
    with zipfile.ZipFile(cast("IO[bytes]", _Unseekable(stream)), "w") as archive:
        described = write_state((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
        archive.writestr(_aligned(archive, "data.pkl", zip64=False), described)
        archive.writestr(_aligned(archive, "byteorder", zip64=False), b"little")
        for number, tensor in enumerate(tensors):
            with archive.open(_aligned(archive, f"data/{number}"), "w", force_zip64=True) as member:
                stream.write_tensor(tensor, member.write)
        archive.writestr(_aligned(archive, "version", zip64=False), b"3\n")


class _Unseekable:
    """What `zipfile` needs of a file that is written from its first byte to its last."""

    def __init__(self, stream: FileStream) -> None:
        self._stream = stream

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        return len(data)

    def flush(self) -> None:
        pass


def _aligned(archive: zipfile.ZipFile, name: str, *, zip64: bool = True) -> zipfile.ZipInfo:
    """A member whose bytes will begin at a multiple of `_ALIGNMENT`, by an extra field that torch uses, too."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    assert archive.fp is not None
    begin = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + 4 + zip64 * _ZIP64_FIELD
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<2H", 0x4246, padding) + b"Z" * padding
    return info
