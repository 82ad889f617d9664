"""Memory for bytes on their way, lent and used again: the system takes longer to clear a fresh page than to read into it."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class Memory:
    """Lends blocks of bytes. A block comes back by itself, as soon as nothing refers to it any more.

    As many blocks are kept as were ever lent at once. May be used from several threads.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray[Any, Any]] = []
        self._lock = threading.Lock()

    def __call__(self, size: int) -> memoryview:
        """A block of `size` bytes, whatever they hold."""
        whole = self._take(size)
        lent = whole[:size]  # an object of its own: it lives as long as the memoryview and all that is cut from that
        weakref.finalize(lent, self._free.append, whole).atexit = False
        return lent.data

    def _take(self, size: int) -> np.ndarray[Any, Any]:
        """The smallest free block that is large enough, or a new one in place of the largest that is not."""
        import numpy as np

        with self._lock:
            sizes = sorted((len(block), at) for at, block in enumerate(self._free))
            fitting = [at for length, at in sizes if length >= size]
            chosen = fitting[0] if fitting else sizes[-1][1] if sizes else None
            block = self._free.pop(chosen) if chosen is not None else None  # others only append meanwhile
        return block if block is not None and len(block) >= size else np.empty(size, np.uint8)
