"""The container of `torch.save`, for `.bin` and `.pth` files: read without running code, written tensor by tensor.

Such a file is an uncompressed zip archive: a pickle that describes the tensors, then one member of raw bytes for each
storage. The pickle is read by torch's own restricted unpickler over tensors without memory, which gives the place of
every storage; the bytes are then read like those of any other file.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from calpaca.core.checkpoint.dtypes import code_of, to_torch
from calpaca.core.checkpoint.plan import PlannedTensor
from calpaca.core.checkpoint.stream import FileStream
from calpaca.core.checkpoint.tensor import StoredTensor
from calpaca.core.errors import CorruptFileError, ModelNotFoundError, UnsupportedError

if TYPE_CHECKING:
    import torch

_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
_CENTRAL_CRC, _DESCRIPTOR_CRC = 16, 4  # byte positions within a central header and a data descriptor


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, without its bytes. Pickled code is refused, never run.

    Raises CorruptFileError for a damaged file or one with code in it, UnsupportedError for other contents.
    """
    loaded = _load_without_data(file)
    found: dict[str, StoredTensor] = {}
    end = 0
    for name, value in loaded.items():
        if not hasattr(value, "untyped_storage"):
            raise UnsupportedError(
                f"{file} holds {type(value).__name__} under '{name}' where a tensor is expected.",
                "Name a file that holds a model's tensors alone (a state dict).",
            )
        found[name] = _stored(name, value, file)
        end = max(end, value.untyped_storage()._checkpoint_offset + value.untyped_storage().nbytes())
    if end > file.stat().st_size:
        raise CorruptFileError(
            f"{file} is truncated: it has {file.stat().st_size:,} bytes and its tensors end at {end:,}.",
            "Fetch the file again.",
        )
    return found


def _load_without_data(file: Path) -> dict[str, Any]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not file.is_file():
        raise ModelNotFoundError(f"{file} does not exist.", "Check the path.")
    if not zipfile.is_zipfile(file):
        raise CorruptFileError(
            f"{file} ({file.stat().st_size:,} bytes) is truncated, or was saved by a PyTorch older than 1.6.",
            "Fetch the file again, or load it with torch.load and save it again.",
        )
    try:
        with FakeTensorMode():
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CorruptFileError(
            f"{file} holds code instead of tensors; it was not run.", "Take a safetensors version of the weights."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise CorruptFileError(f"{file} is damaged: {reason}", "Fetch the file again.") from error
    if not isinstance(loaded, dict):
        raise UnsupportedError(f"{file} holds no tensors by name.", "Name a file that holds a model's state dict.")
    return loaded


def _stored(name: str, tensor: torch.Tensor, file: Path) -> StoredTensor:
    storage: Any = tensor.untyped_storage()
    return StoredTensor(
        name=name,
        dtype=code_of(tensor.dtype),
        shape=tuple(tensor.shape),
        file=file,
        offset=storage._checkpoint_offset + tensor.storage_offset() * tensor.element_size(),
        strides=None if tensor.is_contiguous() else tuple(tensor.stride()),
    )


def write(stream: FileStream, tensors: Sequence[PlannedTensor]) -> None:
    """Write a whole file: torch writes one without the tensors' bytes first, which are then put in their places.

    The archive's checksums are those of the bytes, so that any zip reader accepts the file.
    """
    with TemporaryDirectory() as folder:
        skeleton = Path(folder) / "archive.pth"  # torch names the archive's root after the file
        places = _write_skeleton(skeleton, tensors)
        with skeleton.open("rb") as opened:
            position, checksums, crc = 0, dict[int, int](), None
            for place, tensor in sorted(zip(places, tensors, strict=True), key=lambda pair: pair[0]):
                opened.seek(position)
                stream.write(_with_descriptor(opened.read(place - position), crc))
                crc = checksums[place] = stream.write_tensor(tensor, checksum=True)
                position = place + tensor.size
            opened.seek(position)
            rest = _with_descriptor(opened.read(), crc)
        stream.write(_with_directory(rest, position, skeleton, checksums))


def _write_skeleton(file: Path, tensors: Sequence[PlannedTensor]) -> list[int]:
    """Save tensors of these shapes without their bytes (a sparse file); returns where each one's bytes belong."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    empty = {tensor.name: torch.empty(tensor.shape, dtype=to_torch(tensor.dtype)) for tensor in tensors}
    with torch.serialization.skip_data():
        torch.save(empty, file)
    with FakeTensorMode():
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    return [int(loaded[tensor.name].untyped_storage()._checkpoint_offset) for tensor in tensors]


def _with_descriptor(gap: bytes, crc: int | None) -> bytes:
    """The bytes after a member, which begin with its data descriptor, with the member's checksum in it."""
    if crc is None:
        return gap
    return gap[:_DESCRIPTOR_CRC] + crc.to_bytes(4, "little") + gap[_DESCRIPTOR_CRC + 4 :]


def _with_directory(rest: bytes, start: int, archive: Path, checksums: dict[int, int]) -> bytes:
    """The archive's end with the members' checksums in its directory. `start` is the position of `rest`."""
    patched = bytearray(rest)
    with zipfile.ZipFile(archive) as opened:
        position = opened.start_dir - start
        for member in opened.infolist():
            header = _CENTRAL_HEADER.unpack_from(patched, position)
            data = _data_start(archive, member.header_offset)
            if data in checksums:
                patched[position + _CENTRAL_CRC : position + _CENTRAL_CRC + 4] = checksums[data].to_bytes(4, "little")
            position += _CENTRAL_HEADER.size + sum(header[10:13])  # name, extra field, comment
    return bytes(patched)


def _data_start(archive: Path, header_offset: int) -> int:
    """Where a member's bytes begin: after its local header, name and extra field."""
    with archive.open("rb") as opened:
        opened.seek(header_offset + 26)
        name, extra = struct.unpack("<2H", opened.read(4))
    return header_offset + 30 + int(name) + int(extra)
