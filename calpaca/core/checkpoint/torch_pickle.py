"""The pickle in a file of `torch.save` that describes its tensors, read and written without torch.

It is a program for a small machine that may call functions by name; reading one therefore means choosing the names.
Those here build dictionaries and tensors, and nothing else is looked up, imported or called. The functions and their
arguments are those of `torch/_utils.py`.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from calpaca.core.checkpoint.dtypes import NAMES, SIZES
from calpaca.core.errors import UnsupportedError

_STORAGES = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}  # fmt: skip
"""torch's classes by code. Types that are younger have none: their storage counts bytes, and the tensor names the type."""


class PickledCode(Exception):  # noqa: N818  # a finding, not a fault of the program
    """The name of a function that a pickle wants called."""


@dataclass(frozen=True)
class Storage:
    """A member of the archive and the type of its elements; `length` counts them, bytes where there is no type."""

    key: str
    dtype: str | None
    length: int


@dataclass(frozen=True)
class DescribedTensor:
    """A tensor without its bytes; `offset` and `strides` are in elements of its storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def reach(self) -> int:
        """Bytes from the storage's beginning to the end of the last element."""
        steps = zip(self.shape, self.strides, strict=True)
        last = sum((length - 1) * step for length, step in steps) + 1 if prod(self.shape) else 0
        return (self.offset + last) * SIZES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        return not prod(self.shape) or all(
            length == 1 or step == plain
            for length, step, plain in zip(self.shape, self.strides, row_major(self.shape), strict=True)
        )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The step along each dimension, in elements, of a tensor that lies row by row."""
    return tuple(max(1, prod(shape[axis + 1 :])) for axis in range(len(shape)))


def read_state(data: bytes) -> Any:
    """What was pickled, with `DescribedTensor` in place of tensors.

    Raises PickledCode where any function but those that build tensors is named, other exceptions for damaged data.
    """
    return _Unpickler(io.BytesIO(data)).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _FOUND:
            raise PickledCode(f"{module}.{name}")
        return _FOUND[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        _, dtype, key, _, length = pid
        return Storage(str(key), dtype or None, int(length))


def _tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> DescribedTensor:
    assert storage.dtype is not None
    return DescribedTensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _young_tensor(
    storage: Storage, offset: int, shape: Any, strides: Any, _grad: bool, _hooks: Any, dtype: str, *_: Any
) -> DescribedTensor:
    return DescribedTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(tensor: DescribedTensor, *_: Any) -> DescribedTensor:
    return tensor


_FOUND: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _young_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "UntypedStorage"): "",
    **{("torch", storage): code for code, storage in _STORAGES.items()},
    **{("torch", name): code for code, name in NAMES.items()},
}


def write_state(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The pickle of a dictionary of tensors: name, code and shape of each, whose bytes are the members 0, 1, 2 …

    Raises UnsupportedError for a type that torch does not have.
    """
    entries = (
        _text(name) + _described(str(number), dtype, shape) for number, (name, dtype, shape) in enumerate(tensors)
    )
    return b"\x80\x02}(" + b"".join(entries) + b"u."  # protocol 2, an empty dictionary, its entries, the end


def _described(key: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    if dtype not in NAMES:
        raise UnsupportedError(f"Tensors of type {dtype} cannot be written.", f"Known types: {', '.join(NAMES)}.")
    typed = dtype in _STORAGES
    kind = _global("torch", _STORAGES[dtype]) if typed else _global("torch.storage", "UntypedStorage")
    length = prod(shape) * (1 if typed else SIZES[dtype])
    storage = _tuple(_text("storage"), kind, _text(key), _text("cpu"), _integer(length)) + b"Q"
    no_hooks = _global("collections", "OrderedDict") + b")R"
    place = [storage, _integer(0), _integers(shape), _integers(row_major(shape)), b"\x89", no_hooks]
    if typed:
        return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(*place) + b"R"
    return _global("torch._utils", "_rebuild_tensor_v3") + _tuple(*place, _global("torch", NAMES[dtype])) + b"R"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _integers(numbers: Iterable[int]) -> bytes:
    return _tuple(*map(_integer, numbers))


def _integer(number: int) -> bytes:
    data = pickle.encode_long(number)
    return b"\x8a" + bytes([len(data)]) + data
