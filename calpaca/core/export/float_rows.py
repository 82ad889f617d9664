"""Rows of a tensor as float32 numbers, a few megabytes at a time, in the order that a GGUF file has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from calpaca.core.checkpoint.dtypes import SIZES
from calpaca.core.checkpoint.plan import Buffer, PlannedTensor
from calpaca.core.convert.rows import pairs, regroup, row_size
from calpaca.core.errors import CorruptFileError, UnsupportedError
from calpaca.core.export.gguf_types import Rows

_BLOCK = 4 << 20  # bytes of stored numbers that are converted at a time
_FLOATS = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


def float_rows(tensor: PlannedTensor, head_dim: int | None) -> Iterator[Rows]:
    """All rows, as float32 [rows, columns]; a vector is one row.

    With `head_dim` the rows of each head are put in the order of the original LLaMA, which llama.cpp computes with.
    Raises CorruptFileError for NaN and infinity, UnsupportedError for numbers that are no floats.
    """
    if tensor.dtype != "BF16" and tensor.dtype not in _FLOATS:
        raise UnsupportedError(
            f"{tensor.name} is stored as {tensor.dtype}, which cannot be exported.", "Take unquantized weights."
        )
    row = row_size(tensor) if len(tensor.shape) > 1 else SIZES[tensor.dtype]
    chunks: Iterable[Buffer] = tensor.chunks() if head_dim is None else pairs(tensor.chunks(), head_dim, row)
    whole = row if len(tensor.shape) > 1 else tensor.size
    for piece in regroup(chunks, max(1, _BLOCK // whole) * whole):
        numbers = _floats(piece, tensor.dtype).reshape(-1, whole // SIZES[tensor.dtype])
        if not np.isfinite(numbers).all():
            raise CorruptFileError(f"{tensor.name} holds NaN or infinity.", "Fetch the weights again, or train anew.")
        yield numbers


def _floats(piece: memoryview, dtype: str) -> Rows:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(piece, "<u2").astype(np.uint32) << 16).view(np.float32)
    numbers: np.ndarray[Any, Any] = np.frombuffer(piece, _FLOATS[dtype])
    return numbers.astype(np.float32, copy=False)
