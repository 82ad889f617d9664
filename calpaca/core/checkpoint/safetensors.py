"""The safetensors container, read and written by its specification: no file is ever held in memory.

Format: https://github.com/huggingface/safetensors#format — eight bytes of length (little-endian), a JSON header
padded with spaces, then the bytes of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calpaca.core.checkpoint.dtypes import SIZES
from calpaca.core.checkpoint.plan import PlannedTensor
from calpaca.core.checkpoint.stream import FileStream
from calpaca.core.checkpoint.tensor import StoredTensor
from calpaca.core.errors import CorruptFileError, ModelNotFoundError

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, from its header. Raises CorruptFileError when the file is damaged or truncated."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            text = opened.read(length) if length <= min(size, _LONGEST_HEADER) else b""
    except OSError as error:
        raise ModelNotFoundError(f"{file} cannot be read: {error.strerror or error}.", "Check the path.") from error
    try:
        tensors = _parse(file, json.loads(text), 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{file} ({size:,} bytes) has no readable safetensors header.", "Fetch the file again."
        ) from error
    _check_places(file, tensors, size, 8 + length)
    return tensors


def _parse(file: Path, header: dict[str, Any], start: int) -> dict[str, StoredTensor]:
    """The header's tensors. Raises ValueError where the space a tensor has is not what its shape needs."""
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(name, entry["dtype"], tuple(map(int, entry["shape"])), file, start + int(begin))
        if entry["dtype"] in SIZES and tensors[name].size != end - begin:
            raise ValueError("a tensor's offsets do not fit its shape")
    return tensors


def _check_places(file: Path, tensors: Mapping[str, StoredTensor], size: int, start: int) -> None:
    end = start
    for tensor in sorted(tensors.values(), key=lambda each: (each.offset, each.size)):
        if tensor.dtype in SIZES and tensor.offset != end:
            raise CorruptFileError(
                f"{file}: {tensor.name} begins at byte {tensor.offset:,}, not at {end:,} where the one before ends.",
                "Fetch the file again.",
            )
        end = tensor.offset + tensor.size
    if end > size:
        raise CorruptFileError(
            f"{file} is truncated: it has {size:,} bytes, but its header announces {end:,}.", "Fetch the file again."
        )


def write(stream: FileStream, tensors: Sequence[PlannedTensor]) -> None:
    """Write a whole file: the header is known before the first tensor is made."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        stream.write_tensor(tensor)
