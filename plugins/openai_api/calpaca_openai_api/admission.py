"""Who may run: a bounded number of requests at once, a bounded number waiting, in fair order between keys."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from calpaca_openai_api.faults import busy


class Admission:
    """Slots for requests. All calls come from one event loop."""

    def __init__(self, max_running: int, max_waiting: int, timeout: float = 600.0) -> None:
        """`timeout` is how many seconds a request may take, waiting included."""
        self.timeout = timeout
        self.by_model: dict[str, Counter[tuple[str, str]]] = {"running": Counter(), "waiting": Counter()}
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.running = 0
        self.draining = False
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._by_key: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    def check(self, key: str, concurrency: int | None) -> None:
        """Raise ApiError 429 for a key that has too many requests, 503 when the queue is full."""
        if concurrency is not None and self._by_key[key] >= concurrency:
            raise busy(f"This key may have {concurrency} requests at once.", status=429, code="rate_limit_exceeded")
        if not self._is_free and self.waiting >= self.max_waiting:
            raise busy(f"{self.waiting} requests are waiting already.", seconds=2)

    @property
    def _is_free(self) -> bool:
        return self.running < self.max_running and not self._queues

    @asynccontextmanager
    async def slot(self, key: str, concurrency: int | None = None, model: str = "") -> AsyncIterator[None]:
        """Wait for a slot and hold it. Raises ApiError as `check`."""
        self.check(key, concurrency)
        self._by_key[key] += 1
        try:
            with self._counted("waiting", model, key):
                await self._enter(key)
            try:
                with self._counted("running", model, key):
                    yield
            finally:
                self._leave()
        finally:
            self._by_key[key] -= 1
            if not self._by_key[key]:
                del self._by_key[key]

    @contextmanager
    def _counted(self, state: str, model: str, key: str) -> Iterator[None]:
        """What the metrics show."""
        self.by_model[state][model, key] += 1
        try:
            yield
        finally:
            self.by_model[state][model, key] -= 1

    async def _enter(self, key: str) -> None:
        if self._is_free:
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # the slot came at the very moment in which nobody wanted it any more
            else:
                self._forget(key, turn)
            raise

    def _leave(self) -> None:
        """Hand the slot to the next key's oldest request."""
        self.running -= 1
        while self._queues:
            key, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._queues[key] = queue
            if not turn.done():  # else its request was cancelled and has not noticed yet
                self.running += 1
                turn.set_result(None)
                return

    def _forget(self, key: str, turn: asyncio.Future[None]) -> None:
        queue = self._queues.get(key)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._queues[key]
