"""The engine's threads make way for other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from calpaca.core import machine
from calpaca.core.engines.native import threads as native_threads
from calpaca.core.engines.threads import CHECK_SECONDS, Neighbours, ThreadPolicy, busy_seconds, threads_beside

torch = pytest.importorskip("torch")

STAT = """cpu  900 0 90 9000 9 0 0 0 0 0
cpu0 100 10 20 5000 7 1 2 3 4 5
cpu1 200 0 40 5000 7 0 0 0 0 0
cpu12 9 9 9 9 9 9 9 9 9 9
intr 12
"""


def test_busy_time_is_that_of_the_own_cores_without_idling_and_guests() -> None:
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert busy_seconds(STAT, {0}) == pytest.approx(136 * tick)
    assert busy_seconds(STAT, {0, 1}) == pytest.approx(376 * tick)


@pytest.mark.parametrize(
    ("others", "cores", "most", "threads"),
    [
        (0.0, 2, 2, 2),
        (0.2, 2, 2, 2),
        (0.5, 2, 2, 1),
        (1.0, 2, 2, 1),
        (5.0, 2, 2, 1),
        (3.1, 16, 16, 13),
        (0.0, 16, 4, 4),
    ],
)
def test_threads_are_the_cores_that_others_leave(others: float, cores: int, most: int, threads: int) -> None:
    assert threads_beside(others, most, cores) == threads


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell what its cores do")
def test_busy_neighbours_take_threads_away() -> None:
    before = torch.get_num_threads()
    cores = os.sched_getaffinity(0)
    torch.set_num_threads(max(2, len(cores)))
    policy = ThreadPolicy()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
    try:
        deadline = time.monotonic() + 20
        while policy.free > 1 and time.monotonic() < deadline:
            time.sleep(CHECK_SECONDS)
            policy.look()
        assert torch.get_num_threads() == policy.threads == 1
    finally:
        for process in busy:
            process.kill()
            process.wait()
        torch.set_num_threads(before)


@pytest.mark.parametrize(("seconds", "chosen"), [({1: 1.0, 2: 9.0}, 1), ({1: 1.0, 2: 0.6}, 2)])
def test_beside_others_the_faster_number_is_found_and_the_slower_one_seldom_tried(
    seconds: dict[int, float], chosen: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    now = [0.0]
    policy = ThreadPolicy(lambda: now[0])
    try:
        policy.make_way(len(os.sched_getaffinity(0)) - 1.0)
        used = []
        for _ in range(300):
            used.append(policy.threads)
            now[0] += seconds[policy.threads]
            policy.note(1, seconds[policy.threads])
        assert used[-1] == chosen
        assert used.count(chosen) > 250
        policy.make_way(0.0)
        assert policy.threads == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("allowed", "quota", "asked", "others", "threads"),
    [
        (range(8), "max 100000", "", 0.0, 4),  # two hardware threads on each of four cores
        ((0, 4, 1), "max 100000", "", 0.0, 2),
        (range(8), "350000 100000", "", 0.0, 3),
        (range(8), "50000 100000", "", 0.0, 1),
        (range(8), "max 100000", "7", 9.0, 7),
        (range(8), "max 100000", "none", 0.0, 4),
        ((0, 1), "max 100000", "", 1.0, 1),
        (range(8), "max 100000", "", 2.0, 4),
        (range(8), "max 100000", "", 20.0, 1),
    ],
)
def test_native_engines_have_a_thread_for_each_physical_core_that_is_theirs_and_that_others_leave(
    allowed: Iterable[int], quota: str, asked: str, others: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list": f"{core % 4}" for core in range(8)}
    files["/sys/fs/cgroup/cpu.max"] = quota
    monkeypatch.setattr(machine, "_read", lambda path: files.get(str(path), ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(allowed), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    neighbours = Neighbours()
    monkeypatch.setattr(neighbours, "cores", lambda: others)
    assert native_threads(neighbours) == threads
