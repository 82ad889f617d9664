"""Lent memory: nobody else gets it while something refers to it, and it is used again afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from calpaca.core.checkpoint.memory import Memory  # noqa: E402


def address(block: memoryview) -> int:
    return np.frombuffer(block, np.uint8).ctypes.data


def test_a_block_that_nothing_refers_to_is_lent_again_also_for_less() -> None:
    memory = Memory()
    block = memory(1000)
    first = address(block)
    del block
    again = memory(10)
    assert (address(again), len(again)) == (first, 10)


@pytest.mark.parametrize(
    "refer",
    [
        lambda block: block[10:20],
        lambda block: np.frombuffer(block, np.uint8)[5:],
        lambda block: torch.frombuffer(block, dtype=torch.float32)[1:].view(torch.uint8).numpy(),
    ],
    ids=["a slice", "an array", "a tensor"],
)
def test_what_was_made_of_a_block_keeps_it(refer) -> None:
    memory = Memory()
    block = memory(1000)
    first, view = address(block), refer(block)
    del block
    other = memory(1000)
    assert address(other) != first
    del view
    assert address(memory(1000)) == first


def test_a_block_that_is_too_small_makes_room_for_a_larger_one() -> None:
    memory = Memory()
    for size in (10, 1000, 100_000):
        assert len(memory(size)) == size
    assert [len(block) for block in memory._free] == [100_000]


def test_threads_never_hold_the_same_block() -> None:
    memory = Memory()

    def fill(value: int) -> bool:
        block = memory(4096)
        block[:] = bytes([value]) * 4096
        return all(byte == value for byte in block)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, [number % 256 for number in range(400)]))
    assert len(memory._free) <= 4
