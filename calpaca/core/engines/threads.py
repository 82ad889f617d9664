"""How many threads a step uses beside other processes.

A step waits for its slowest thread. Where another process takes a core, a thread per core can be several times slower
than one thread less, or still faster, as the system shares its cores out. So while others are busy both are tried, the
slower one for a few steps only, and the better one stays for a while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Set
from pathlib import Path
from statistics import median

CHECK_SECONDS = 0.5
"""Between two looks at what other processes do."""

TOLERATED = 0.3
"""Cores that others may use, beyond a whole number, before there is one less."""

TRIAL = 4
"""Turns that a number of threads is tried for; one is enough for a number that is much slower."""

SHORTEST, LONGEST = 4.0, 64.0
"""Seconds for which the result of a trial stands; twice as long each time that it is the same."""


class Neighbours:
    """What other processes use of the cores that this one may run on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen = (clock(), *_seconds())

    @property
    def age(self) -> float:
        """Seconds since it was made, or last asked for `cores`."""
        return self._clock() - self._seen[0]

    def cores(self) -> float:
        """How many cores others used on average, in that time."""
        begin, all_before, own_before = self._seen
        busy, own = _seconds()
        self._seen = (self._clock(), busy, own)
        return ((busy - all_before) - (own - own_before)) / max(self._seen[0] - begin, 1e-3)


class ThreadPolicy:
    """Sets the number of torch's threads for the thread that calls it, at most as many as there are at first.

    That is what OMP_NUM_THREADS or `torch.set_num_threads` say, else the number of cores. Where the system does not
    tell what its cores do (others than Linux), it stays so.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        import torch

        self.most = self.threads = torch.get_num_threads()
        self.free = self.most  # threads for which there is a core each
        self._clock = clock
        self._neighbours = Neighbours(clock)
        self._tried: dict[int, list[float]] = {}
        self._stands_until = 0.0
        self._stands_for = SHORTEST

    def look(self) -> None:
        """See what other processes did since the last look, if that was a while ago."""
        if self.most > 1 and self._neighbours.age >= CHECK_SECONDS:
            self.make_way(self._neighbours.cores())

    def make_way(self, others: float) -> None:
        """Start afresh when the cores that others use are more or fewer than before."""
        free = threads_beside(others, self.most)
        if free != self.free:
            self.free = free
            self._tried, self._stands_until, self._stands_for = {}, 0.0, SHORTEST
            self._use(free)

    def note(self, tokens: int, seconds: float) -> None:
        """Take the time of a turn into account, and go on with the trial if there is one."""
        if self.free == self.most or self._clock() < self._stands_until:
            return
        if not self._tried and self.threads != self.free:
            self._use(self.free)  # a trial begins with the safe number
            return
        times = self._tried.setdefault(self.threads, [])
        times.append(seconds / (16 + tokens))  # what a turn costs beside its tokens is worth about 16
        if self.threads == self.free:
            self._use(self.free if len(times) < TRIAL else self.most)
        elif len(times) == TRIAL or times[-1] > 2 * median(self._tried[self.free]):
            self._settle()

    def _settle(self) -> None:
        """Use the faster number for a while."""
        best = min(self._tried, key=lambda threads: median(self._tried[threads]))
        other = self.most if best == self.free else self.free
        clear = median(self._tried[best]) < 0.8 * median(self._tried[other])
        self._stands_until = self._clock() + self._stands_for
        self._stands_for = min(LONGEST, 2 * self._stands_for) if clear else SHORTEST
        self._tried = {}
        self._use(best)

    def _use(self, threads: int) -> None:
        import torch

        if threads != self.threads:
            self.threads = threads
            torch.set_num_threads(threads)


def threads_beside(others: float, most: int, cores: int | None = None) -> int:
    """Threads for which there is a core each, of this process's `cores`, of which other processes use `others`."""
    return max(1, min(most, int((cores or len(_cores())) - others + TOLERATED)))


def _seconds() -> tuple[float, float]:
    """Seconds of processor time: of everything on the cores that this process may use, and of this process."""
    try:
        text = Path("/proc/stat").read_text(encoding="ascii")
    except OSError:
        return 0.0, 0.0
    return busy_seconds(text, _cores()), time.process_time()


def busy_seconds(stat: str, cores: Set[int]) -> float:
    """Seconds that cores worked, from /proc/stat. Its columns are user, nice, system, idle, iowait, irq, softirq, steal,
    and guests, whose time is in user already (`man 5 proc_stat`)."""
    names = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in stat.splitlines():
        name, *columns = line.split()
        if name in names:
            user, nice, system, _, _, *interrupts = map(int, columns[:8])
            ticks += user + nice + system + sum(interrupts)
    return ticks / os.sysconf("SC_CLK_TCK")


def _cores() -> Set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
