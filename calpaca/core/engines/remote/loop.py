"""An event loop in a thread of its own, for code that is called from any thread and any other loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines until it is closed."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def post(self, call: Callable[[], object]) -> None:
        """Call a function there soon; calls keep their order. Does nothing once the loop is closed."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def cancel_all(self) -> None:
        """Cancel what runs and wait until it has ended."""
        self.wait(_cancel_all())

    def close(self) -> None:
        """Cancel what runs, and stop. Idempotent."""
        if self._loop.is_closed():
            return
        self.cancel_all()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    """Cancel every task, in rounds: what a task begins while it is asked to end comes in the next one."""
    own = asyncio.current_task()
    while tasks := asyncio.all_tasks() - {own}:
        await asyncio.sleep(0)  # a task cancelled before its first step would leave its coroutine unawaited
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
