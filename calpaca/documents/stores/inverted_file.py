"""An inverted file over many vectors: a memory-mapped FAISS index on disk that looks at a few clusters per question.

Vectors are kept in 8 bits per number (IVF with scalar quantizer, Jégou, Douze and Schmid, TPAMI 33, 2011; faiss wiki,
"Faiss indexes"), so what is found is a choice to be compared exactly. What was deleted since stays in the file until it
is made anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from calpaca.core.errors import DocumentError
from calpaca.core.paths import atomic_file

_PROBES = 64
"""Clusters that are looked at per question; bench/vectors.py measures what it costs and finds."""

_SAMPLES = 64
"""Vectors per cluster that the clusters are learnt from."""

Block = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Numbers [n] and unit vectors [n, dimensions]."""


class InvertedFile:
    """Numbers by nearness to a vector. `size` counts the vectors, `last` is the highest number among them."""

    def __init__(self, path: Path) -> None:
        """Raises DocumentError when the file cannot be read."""
        self.path = path
        self.last = int(path.stem.rpartition("-")[2])
        try:
            index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise DocumentError(f"{path} cannot be read: {error}.", "Delete it; it is made again.") from error
        index.nprobe = _PROBES
        self._index = index
        self.size = int(index.ntotal)
        self.dimensions = int(index.d)

    def nearest(self, vector: NDArray[np.float32], k: int) -> list[int]:
        """About the `k` nearest."""
        _, numbers = self._index.search(vector[None], k)
        return [int(number) for number in numbers[0] if number >= 0]


def newest(folder: Path) -> Path | None:
    """The file in a folder that knows the highest number."""
    return max(folder.glob("vectors-*.ivf"), key=lambda path: int(path.stem.rpartition("-")[2]), default=None)


def write(folder: Path, count: int, sample: NDArray[np.float32], blocks: Iterable[Block]) -> Path:
    """Cluster `count` vectors by a sample of them and write them to a file, whole or not at all.

    Raises DocumentError when there is no room for it.
    """
    clusters = 2 * int(count**0.5)
    quantizer = faiss.IndexFlatIP(sample.shape[1])
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, sample.shape[1], clusters, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.max_points_per_centroid = _SAMPLES
    index.train(sample)
    last = 0
    for numbers, vectors in blocks:
        index.add_with_ids(vectors, numbers)
        last = int(numbers[-1])
    path = folder / f"vectors-{last}.ivf"
    try:
        with atomic_file(path) as part:
            faiss.write_index(index, str(part))
    except (OSError, RuntimeError) as error:
        raise DocumentError(
            f"{path} cannot be written: {error}.", "Free disk space or check the permissions; CALPACA_CACHE moves it."
        ) from error
    for old in folder.glob("vectors-*.ivf"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def sample_size(count: int) -> int:
    """How many vectors the clusters of `count` are learnt from."""
    return min(count, 2 * int(count**0.5) * _SAMPLES)
