"""GGUF files: their header, whether they are whole, and their weights as a Hugging Face folder.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from calpaca.core.disk import check_space, disk_errors, megabytes
from calpaca.core.errors import CorruptFileError, MissingExtraError, ModelNotFoundError, UnsupportedError
from calpaca.core.fingerprint import file_digest
from calpaca.core.lock import exclusive
from calpaca.core.paths import atomic_folder, cache_dir

logger = logging.getLogger("calpaca")

Scalar = int | float | bool | str

_RECIPE = 2  # part of the cache's key: a better conversion must not find the older one's result
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS = 8  # ggml has four; more means that the bytes are no tensor's
_converting = threading.Lock()


@dataclass(frozen=True)
class Tensor:
    """`type` is a number of ggml's enumeration, `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """`metadata` holds the scalar values, `arrays` the length of each array, `data_start` is a byte position."""

    metadata: dict[str, Scalar]
    arrays: dict[str, int]
    tensors: tuple[Tensor, ...]
    data_start: int

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def main_type(self) -> str | None:
        """ggml's name of the type that most weights are stored in, such as `Q4_1`."""
        counts: Counter[int] = Counter()
        for tensor in self.tensors:
            counts[tensor.type] += prod(tensor.shape)
        return _type_name(counts.most_common(1)[0][0]) if counts else None

    def of_architecture(self, key: str) -> Scalar | None:
        """The value of `<architecture>.<key>`, such as `llama.context_length`."""
        return self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")


def read_header(path: Path) -> Header:
    """Read a GGUF header. Raises CorruptFileError when there is none or the file ends inside it."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).header()
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    except (ValueError, EOFError) as error:
        raise CorruptFileError(f"{path} is no whole GGUF file: {error}.", "Fetch the file again.") from error


def check(path: Path) -> Header:
    """The header of a file that is as long as its header says. Raises CorruptFileError, with both lengths."""
    header = read_header(path)
    size, needed = path.stat().st_size, header.data_start + max(map(_end, header.tensors), default=0)
    if size < needed:
        raise CorruptFileError(
            f"{path} is truncated: it has {size:,} bytes, but its header announces {needed:,}.", "Fetch the file again."
        )
    if int(header.metadata.get("split.count", 1)) > 1:
        raise UnsupportedError(
            f"{path} is one of {header.metadata['split.count']} parts of a model.",
            "Join them with llama.cpp's `llama-gguf-split --merge`, and name the joined file.",
        )
    return header


def hf_folder(path: Path) -> Path:
    """The weights of a GGUF file as a Hugging Face folder: float16 safetensors, tokenizer, chat template.

    Made once and kept in the cache by the file's contents. Raises CorruptFileError, or UnsupportedError for an
    architecture that transformers cannot read from GGUF.
    """
    folder = converted_folder(path)
    if folder.is_dir():
        return folder
    header = check(path)
    needed = 2 * header.parameters
    with exclusive(folder):
        if not folder.is_dir():
            check_space(folder.parent, needed, f"The float16 form of {path.name}")
            logger.info("Converting %s to a Hugging Face folder of %s, once.", path.name, megabytes(needed))
            with (
                _converting,
                disk_errors(folder.parent, f"The float16 form of {path.name}", needed),
                atomic_folder(folder) as unfinished,
            ):
                _convert(path, unfinished)
    return folder


def converted_folder(path: Path) -> Path:
    """Where `hf_folder` keeps the conversion of this file, made or not."""
    return cache_dir() / "converted" / f"{file_digest(path)[:32]}-{_RECIPE}"


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of every tensor of a whole file. Raises CorruptFileError."""
    header = check(path)
    return {tensor.name: (header.data_start + tensor.offset, _end(tensor) - tensor.offset) for tensor in header.tensors}


def _end(tensor: Tensor) -> int:
    """The byte after the tensor, from the start of the data. Types that gguf does not know count as empty."""
    constants = _constants()
    try:
        block, size = constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType(tensor.type)]
    except (ValueError, KeyError):
        return tensor.offset
    return tensor.offset + prod(tensor.shape) // int(block) * int(size)


def _type_name(number: int) -> str:
    try:
        return str(_constants().GGMLQuantizationType(number).name)
    except ValueError:
        return f"type {number}"


def _constants() -> Any:
    """ggml's types and their sizes."""
    try:
        from gguf import constants
    except ModuleNotFoundError as error:
        raise MissingExtraError("A GGUF file", "torch", error.name or "gguf") from error
    return constants


def _convert(path: Path, target: Path) -> None:
    try:
        import torch
        from safetensors import SafetensorError

        from calpaca.core.gguf_model import load_model
    except ModuleNotFoundError as error:
        raise MissingExtraError("Using a GGUF file", "torch", error.name or "torch") from error
    with _alone(path) as folder, without_bars():
        try:
            model = load_model(folder / path.name, torch.float16)
            _save_tokenizer(folder / path.name, target, model.config.max_position_embeddings)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise UnsupportedError(
                f"{path.name} cannot be read by transformers: {error}.",
                "Use the model's Hugging Face folder instead.",
            ) from error
        try:
            model.save_pretrained(target)
        except SafetensorError as error:  # how its writer reports a full disk
            raise OSError(str(error)) from error


def _save_tokenizer(path: Path, target: Path, context_length: int) -> None:
    """The ids are those that llama.cpp gives; a kind of tokenizer that is not known here is left to transformers."""
    from transformers import AutoTokenizer

    from calpaca.core.gguf_tokenizer import hugging_face_files

    try:
        files = hugging_face_files(path, context_length)
    except UnsupportedError as error:
        logger.warning("%s Its tokenizer is converted by transformers, which may give other ids.", error.message)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        tokenizer.model_max_length = context_length
        tokenizer.save_pretrained(target)
        return
    for name, content in files.items():
        (target / name).write_bytes(content)


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder with nothing but the file in it: transformers would take a tokenizer.json that lies beside it."""
    with TemporaryDirectory() as name:
        link = Path(name) / path.name
        for make in (os.symlink, os.link):
            with contextlib.suppress(OSError):
                make(path.absolute(), link)
                break
        yield Path(name) if link.exists() else path.parent


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' four progress bars off the screen; they cannot be told to vanish."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


class _Reader:
    """Reads the header's values in order. Raises ValueError or EOFError with what is wrong."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        version = self._number("I")
        if version not in {2, 3}:
            raise ValueError(f"version {version} is not 2 or 3")
        tensors, values = self._number("Q"), self._number("Q")
        metadata: dict[str, Scalar] = {}
        arrays: dict[str, int] = {}
        for _ in range(values):
            key, kind = self._string(), self._number("I")
            if kind == _ARRAY:
                arrays[key] = self._skip_array()
            else:
                metadata[key] = self._scalar(kind)
        found = tuple(self._tensor() for _ in range(tensors))
        alignment = int(metadata.get("general.alignment", 32))
        return Header(metadata, arrays, found, -(-self.file.tell() // alignment) * alignment)

    def _bytes(self, count: int) -> bytes:
        # A damaged length may ask for more memory than there is: compare with the file before reading.
        if count > self.size - self.file.tell():
            raise EOFError(f"it has {self.size:,} bytes and ends inside its header")
        return self.file.read(count)

    def _number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._bytes(struct.calcsize(kind)))[0]

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            raise ValueError(f"a value has the unknown type {kind}")
        value: Scalar = self._number(_SCALARS[kind])
        return value

    def _skip_array(self) -> int:
        kind, length = self._number("I"), int(self._number("Q"))
        if kind == _STRING:
            for _ in range(length):
                self._bytes(self._number("Q"))
        elif kind in _SCALARS:
            self._bytes(length * struct.calcsize(_SCALARS[kind]))
        else:
            raise ValueError(f"an array has elements of the unknown type {kind}")
        return length

    def _tensor(self) -> Tensor:
        name, dimensions = self._string(), self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"tensor '{name}' has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return Tensor(name, shape, self._number("I"), self._number("Q"))
