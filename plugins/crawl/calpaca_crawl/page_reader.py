"""Reads pages beside the crawl: extracting a text takes longer than fetching it, and would hold up all other requests."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

from calpaca_crawl.page import Page, read_page

_FEW = 50
"""Pages that are read in this process: starting others takes a second, which a small crawl has no use for."""
_MOST_PROCESSES = 4


class PageReader:
    """Reads the first pages itself, and those of a larger crawl in other processes, one for each core but the crawl's."""

    def __init__(self) -> None:
        self._processes = (
            min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 1 + _MOST_PROCESSES) - 1
        )
        self._pool: ProcessPoolExecutor | None = None
        self._count = 0

    async def read(self, url: str, body: bytes, declared: str | None) -> Page:
        """The page, as `read_page` gives it; without text where its process was killed over it."""
        self._count += 1
        if self._count <= _FEW or self._processes < 1:
            return read_page(url, body, declared)
        pool = self._started()
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, read_page, url, body, declared)
        except BrokenExecutor:
            if self._pool is pool:
                self.close()
            return Page(url)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # this process has threads
            self._pool = ProcessPoolExecutor(self._processes, mp_context=spawn, initializer=_begin)
        return self._pool

    def close(self) -> None:
        """End the processes. They are started anew when another page is read."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _begin() -> None:
    """Leave Ctrl-C to the crawl, and end with it also where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
