"""Making the next tensor while the last one is hashed and written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from calpaca.core.checkpoint.plan import Buffer, PlannedTensor


def look_ahead(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """The same tensors, to be asked for in this order. Those that are computed are made on one thread, one ahead."""
    made = _Made([tensor for tensor in tensors if tensor.memory])
    numbers = iter(range(len(tensors)))
    return [
        replace(tensor, chunks=partial(made.take, next(numbers))) if tensor.memory else tensor for tensor in tensors
    ]


class _Made:
    """Computed tensors by number. At most two are in memory: the one taken last, and the one after it."""

    def __init__(self, tensors: Sequence[PlannedTensor]) -> None:
        self._tensors = tensors
        self._pool: ThreadPoolExecutor | None = None
        self._begun: dict[int, Future[list[Buffer]]] = {}

    def take(self, number: int) -> list[Buffer]:
        """The bytes of a tensor; the next one is begun. One that was begun in vain is forgotten."""
        future = self._begun.pop(number, None) or self._begin(number)
        self._begun.clear()
        buffers = future.result()
        if number + 1 < len(self._tensors):
            self._begun[number + 1] = self._begin(number + 1)
        return buffers

    def _begin(self, number: int) -> Future[list[Buffer]]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1)
        return self._pool.submit(lambda: list(self._tensors[number].chunks()))


@contextmanager
def a_core_for_hashing() -> Iterator[None]:
    """Leave one core to the threads that hash and write: torch's own would wait for it, and spin meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, (os.cpu_count() or 1) - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
