"""Rows of a matrix re-arranged as its bytes stream by, a few megabytes at a time.

Original LLaMA turns neighbouring pairs of rows of a head (rotary embedding), Hugging Face turns row `i` with row
`i + head_dim / 2`. The two forms hold the same rows in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from calpaca.core.checkpoint.dtypes import SIZES
from calpaca.core.checkpoint.plan import Buffer, PlannedTensor
from calpaca.core.checkpoint.reader import Checkpoint

_BLOCK = 8 << 20  # bytes that are re-arranged at a time


def row_size(tensor: PlannedTensor) -> int:
    """Bytes of one row: everything behind the first dimension."""
    return prod(tensor.shape[1:]) * SIZES[tensor.dtype]


def rows(tensor: PlannedTensor, start: int, stop: int) -> Iterable[Buffer]:
    """The bytes of some rows. Of a plain copy only these are read; anything else is made whole for them."""
    if (start, stop) == (0, tensor.shape[0]):
        return tensor.chunks()
    size = row_size(tensor)
    stored = tensor.copy_of
    if stored is None or stored.strides is not None:
        return _cut(tensor.chunks(), start * size, stop * size)
    part = replace(stored, shape=(stop - start, *stored.shape[1:]), offset=stored.offset + start * size)
    return Checkpoint(stored.file, {stored.name: part}).chunks(stored.name)


def halves(chunks: Iterable[Buffer], head_dim: int, row: int) -> Iterator[memoryview]:
    """Original order to Hugging Face's: rows 0, 2, 4 … of every head first, then rows 1, 3, 5 …"""
    return _swap(chunks, (head_dim // 2, 2, row))


def pairs(chunks: Iterable[Buffer], head_dim: int, row: int) -> Iterator[memoryview]:
    """Hugging Face's order to the original one: `halves` undone."""
    return _swap(chunks, (2, head_dim // 2, row))


def _swap(chunks: Iterable[Buffer], head: tuple[int, int, int]) -> Iterator[memoryview]:
    size = prod(head)
    for piece in regroup(chunks, max(1, _BLOCK // size) * size):
        yield _buffer(_bytes(piece).reshape(-1, *head).swapaxes(1, 2))


def columns(chunks: Iterable[Buffer], row: int, start: int, stop: int) -> Iterator[memoryview]:
    """Bytes `start` to `stop` of every row of `row` bytes."""
    for piece in regroup(chunks, max(1, _BLOCK // row) * row):
        yield _buffer(_bytes(piece).reshape(-1, row)[:, start:stop])


def beside(matrices: Sequence[Iterable[Buffer]], widths: Sequence[int]) -> Iterator[memoryview]:
    """Matrices with equally many rows, joined row by row. `widths` are bytes of a row of each."""
    count = max(1, _BLOCK // sum(widths))
    groups = [regroup(chunks, count * width) for chunks, width in zip(matrices, widths, strict=True)]
    for pieces in zip(*groups, strict=True):
        blocks = [_bytes(piece).reshape(-1, width) for piece, width in zip(pieces, widths, strict=True)]
        yield _buffer(np.concatenate(blocks, axis=1))


def regroup(chunks: Iterable[Buffer], size: int) -> Iterator[memoryview]:
    """The same bytes in pieces of `size` (the last may be shorter); copied only where a piece spans two chunks."""
    begun = bytearray()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        if begun:
            needed = size - len(begun)
            begun += view[:needed]
            view = view[needed:]
            if len(begun) < size:
                continue
            yield memoryview(begun)
        whole = len(view) // size * size
        yield from (view[start : start + size] for start in range(0, whole, size))
        begun = bytearray(view[whole:])  # a new one: the last is still being written
    if begun:
        yield memoryview(begun)


def _cut(chunks: Iterable[Buffer], start: int, stop: int) -> Iterator[memoryview]:
    """Bytes `start` to `stop` of a stream."""
    position = 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        piece = view[max(0, start - position) : max(0, stop - position)]
        if piece:
            yield piece
        position += len(view)
        if position >= stop:
            return


def _bytes(piece: memoryview) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(piece, np.uint8)


def _buffer(array: np.ndarray[Any, np.dtype[np.uint8]]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).data
