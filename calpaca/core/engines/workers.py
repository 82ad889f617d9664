"""The processes of a native engine: which one answers for the model alone, and which for each adapter beside it.

Native libraries take no adapter into a model that runs. So a process that has the new one is started beside the one that
runs, requests go to it once it is ready, and the old one ends with its last answer. No request waits for that or fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from calpaca.core.engines.process import Worker
from calpaca.core.errors import AdapterError, ModelError, unknown_name
from calpaca.core.files import AdapterFiles


class Workers:
    """Workers by the adapter that they run; None is the model alone. Thread-safe.

    `start` makes a worker, not opened yet, for adapters whose files are in the library's form. If `together`, one worker
    runs the model and all adapters, and is replaced by one with the new adapter; else each adapter has one to itself.
    """

    def __init__(self, base: Worker, start: Callable[[Sequence[AdapterFiles]], Worker], *, together: bool) -> None:
        self._start = start
        self._together = together
        self._by_name: dict[str | None, Worker] = {None: base}
        self._files: dict[str, AdapterFiles] = {}
        self._lock = threading.RLock()
        self._loading = threading.Lock()  # one after the other: each builds on what is there
        self._closed = False
        base.open()

    @property
    def base(self) -> Worker:
        return self._by_name[None]

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[Worker]:
        """The worker for requests with an adapter, which takes them as long as this is open.

        Raises AdapterError for one that is not loaded.
        """
        with self._lock:
            if adapter not in self._by_name:
                raise AdapterError(*unknown_name("adapter", adapter or "", self._files))
            yield self._by_name[adapter]

    def load(self, adapter: AdapterFiles) -> None:
        """Start a worker with an adapter. Raises what goes wrong there; then everything is as before."""
        with self._loading:
            files = {**self._files, adapter.name: adapter} if self._together else {adapter.name: adapter}
            worker = self._start(list(files.values()))
            try:
                worker.open()
            except BaseException:
                worker.close()
                raise
            with self._lock:
                self._check_open(worker)
                self._files[adapter.name] = adapter
                changed = dict.fromkeys([None, *self._files] if self._together else [adapter.name], worker)
                self._replace({**self._by_name, **changed})

    def unload(self, name: str) -> None:
        """Take no more requests for an adapter. Raises AdapterError for one that is not loaded."""
        with self._lock:
            if name not in self._files:
                raise AdapterError(*unknown_name("adapter", name, self._files))
            del self._files[name]
            self._replace({kept: worker for kept, worker in self._by_name.items() if kept != name})

    def close(self) -> None:
        """End all of them. Idempotent."""
        with self._lock:
            self._closed = True
            workers = {*self._by_name.values()}
        for worker in workers:
            worker.close()

    def _replace(self, by_name: Mapping[str | None, Worker]) -> None:
        """Workers that no name leads to any more end with their last answer."""
        dropped = {*self._by_name.values()} - {*by_name.values()}
        self._by_name = dict(by_name)
        for worker in dropped:
            worker.retire()

    def _check_open(self, worker: Worker) -> None:
        if self._closed:
            worker.close()
            raise ModelError("The engine is closed.", "Load the model again.")
