"""Apps as models: runs of an app with the options that a client may set."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from calpaca.core.errors import UsageError
from calpaca.core.events import Event
from calpaca.core.runtime import Runtime
from calpaca.plugins.app import App, Turn
from calpaca.plugins.exposure import open_options
from calpaca.plugins.options import read_options
from calpaca_openai_api.faults import ApiError

_MOST_RUNNERS = 16
_pool = ThreadPoolExecutor(16, thread_name_prefix="calpaca-app")


class _Runner:
    """A built app. Its first run is made alone, since it may prepare something, such as an index."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self._first = threading.Lock()
        self._prepared = False

    def stream(self, text: str, history: Sequence[Turn], stopped: threading.Event) -> Iterator[Event]:
        """The app's events; none when `stopped` is set before its turn comes."""
        if not self._prepared and not self._is_turn(stopped):
            return
        arguments = {"history": history} if history else {}
        if self._prepared:
            yield from self.runner.stream(text, **arguments)
            return
        try:
            yield from self.runner.stream(text, **arguments)
            self._prepared = True
        finally:
            self._first.release()

    def _is_turn(self, stopped: threading.Event) -> bool:
        """Wait until nobody else makes the first run. The lock is held unless that run has been made by then."""
        while not self._first.acquire(timeout=0.1):
            if stopped.is_set():
                return False
        if self._prepared:
            self._first.release()
        return True


class AppRuns:
    """Runs one app. `presets` are options that the server gives it; they cannot be changed from outside."""

    def __init__(self, app: App, presets: Mapping[str, Any], runtime: Runtime) -> None:
        self.app = app
        self._presets = presets
        self._runtime = runtime
        self._runners: OrderedDict[str, _Runner] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ApiError for an option that no client may set, or that the app does not have.

        Clients choose neither files on this machine nor models to load.
        """
        fields, known = self.app.load_options().model_fields, open_options(self.app)
        for name in options:
            field = f"options.{name}"
            if name not in fields or name == self.app.input:
                raise ApiError(400, f"The app has no option '{name}' to set. Known: {', '.join(known)}.", param=field)
            if name not in known:
                raise ApiError(
                    403, f"The option '{name}' is the server's to set, in [apps.NAME] of its settings.", param=field
                )

    def takes(self, name: str) -> bool:
        """Whether the app has an option of this name that a client may set."""
        return name in open_options(self.app)

    async def events(self, options: Mapping[str, Any], text: str, history: Sequence[Turn] = ()) -> AsyncIterator[Event]:
        """What the app reports, from a thread of its own. Closing the iterator stops the work.

        `history` is for an app that declares it.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        stopped = threading.Event()

        def report(item: Event | BaseException | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def work() -> None:
            if stopped.is_set():
                return  # it waited for a thread, and nobody waits for it any more
            try:
                events = self._runner(options).stream(text, history, stopped)
                for event in events:
                    if stopped.is_set():
                        events.close()  # type: ignore[attr-defined]
                        return
                    report(event)
                report(None)
            except BaseException as error:
                report(error)

        _pool.submit(work)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()

    def _runner(self, options: Mapping[str, Any]) -> _Runner:
        """The app built with these options, or as it was built for them before. Raises CalpacaError."""
        key = json.dumps(options, sort_keys=True, default=str)
        with self._lock:
            if key in self._runners:
                self._runners.move_to_end(key)
                return self._runners[key]
            model = self.app.load_options()
            presets = {name: value for name, value in self._presets.items() if name in model.model_fields}
            try:
                values = read_options(model, {**presets, **options}, self.app.name)
            except UsageError as error:
                raise ApiError(400, error.message, param="options") from error
            self._runners[key] = _Runner(self.app.build(values, self._runtime))
            if len(self._runners) > _MOST_RUNNERS:
                self._runners.popitem(last=False)
            return self._runners[key]
