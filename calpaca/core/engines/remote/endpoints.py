"""Several servers that offer the same models: which one to ask next, and which ones to leave alone for a while."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from calpaca.core.engines.remote.address import Address

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
"""Seconds between tries."""


def backoff(attempt: int) -> float:
    """Seconds to wait after a number of failed tries: twice as long each time, scattered so that clients part."""
    return min(FIRST_DELAY * 2.0 ** (attempt - 1), LONGEST_DELAY) * random.uniform(0.5, 1.0)  # noqa: S311


class Endpoint:
    """One server: how many requests it is answering, and whether it is left alone for now."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.busy = 0
        self.resting = False
        self.failures = 0
        self.last_used = 0


class Endpoints:
    """Chooses among servers. Used within one event loop.

    One that failed rests until `check` finds it well again; it is still asked when all of them rest.
    """

    def __init__(self, addresses: Sequence[Address], check: Callable[[Endpoint], Awaitable[bool]]) -> None:
        self.all = [Endpoint(address) for address in addresses]
        self._check = check
        self._turn = 0
        self._watches: set[asyncio.Task[None]] = set()

    def awake(self) -> list[Endpoint]:
        return [endpoint for endpoint in self.all if not endpoint.resting]

    @contextmanager
    def next(self) -> Iterator[Endpoint]:
        """The least busy server that is awake, in turn; it counts as busy while the block runs."""
        endpoint = min(self.awake() or self.all, key=lambda each: (each.busy, each.last_used))
        self._turn += 1
        endpoint.last_used = self._turn
        endpoint.busy += 1
        try:
            yield endpoint
        finally:
            endpoint.busy -= 1

    def failed(self, endpoint: Endpoint, wait: float | None = None) -> None:
        """Let a server rest; `wait` is how long it asked for."""
        endpoint.failures += 1
        if endpoint.resting:
            return
        endpoint.resting = True
        watch = asyncio.get_running_loop().create_task(self._watch(endpoint, wait))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    def answered(self, endpoint: Endpoint) -> None:
        endpoint.failures, endpoint.resting = 0, False

    async def _watch(self, endpoint: Endpoint, wait: float | None) -> None:
        """Ask a resting server from time to time whether it is well."""
        await asyncio.sleep(backoff(endpoint.failures) if wait is None else wait)
        while endpoint.resting:
            if await self._check(endpoint):
                self.answered(endpoint)
            else:
                endpoint.failures += 1
                await asyncio.sleep(backoff(endpoint.failures))
