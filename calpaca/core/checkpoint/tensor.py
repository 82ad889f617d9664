"""A tensor in a file: what it is and where its bytes lie."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from calpaca.core.checkpoint.dtypes import SIZES


@dataclass(frozen=True)
class StoredTensor:
    """`dtype` is a code of safetensors (`BF16`). The elements lie at `offset` of `file`, row by row.

    `strides` is set only where they do not lie row by row: the step in elements along each dimension.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * SIZES.get(self.dtype, 1)
