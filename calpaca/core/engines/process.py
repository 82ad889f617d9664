"""A process of its own for a native library: a crash in it ends the requests under way and nothing else.

The process is a plain interpreter that is told over a pipe what to run. It is no fork and does not import the caller's
main module. It ends when the pipe closes, so none outlives a caller that was killed; it has a session of its own, so
Ctrl-C reaches the caller only.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from itertools import count
from multiprocessing.connection import Connection, Pipe
from tempfile import TemporaryFile
from typing import IO, Any, Protocol

from calpaca.core.errors import CalpacaError, ModelError

log = logging.getLogger("calpaca")

Event = tuple[int, Any, bool]
"""What a runner has to say about a job: the job's key, a payload or an error, and whether that was the last."""


class BrokenError(Exception):
    """A step broke the runner; `events` are its last."""

    def __init__(self, reason: Exception, events: list[Event]) -> None:
        super().__init__(str(reason))
        self.events = events


_PATIENCE = 5.0
"""Seconds that a process gets to end by itself."""


class Runner(Protocol):
    """What runs in the process. One thread calls it."""

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        ...

    def start(self, key: int, job: Any) -> None:
        """Take a job. Raises CalpacaError for one that cannot be done."""
        ...

    def cancel(self, key: int) -> None:
        """Give a job up; its last event comes all the same. Unknown keys are ignored."""
        ...

    def step(self) -> list[Event]:
        """Work a little, for tens of milliseconds. Any exception means that the runner is broken; see BrokenError."""
        ...

    def close(self) -> None: ...


class Sink(Protocol):
    """Who waits for the events of a job. Called by one thread at a time."""

    def take(self, payload: Any) -> None: ...

    def fail(self, error: Exception) -> None: ...

    def cancel(self) -> None:
        """The worker was closed."""
        ...


class Worker:
    """A runner in a process, started again when it is needed after a crash. Thread-safe.

    `target` (`module:attribute`) is called there with `arguments`, which must be picklable, and returns a Runner.
    `title` names it in messages. Without `isolated` it runs in a thread of this process.
    """

    def __init__(self, target: str, arguments: Mapping[str, Any], title: str, *, isolated: bool = True) -> None:
        self._target, self._arguments, self._title = target, dict(arguments), title
        self._isolated = isolated and os.name == "posix"  # elsewhere a pipe is not handed down like this
        self._keys = count(1)
        self._lock = threading.RLock()
        self._child: _Child | None = None
        self._closed = False
        atexit.register(self.close)

    def open(self) -> None:
        """Start the process and wait until its runner is there. Raises what went wrong there."""
        child = self._living()
        child.ready.wait()
        if child.error is not None:
            raise child.error

    def new_key(self) -> int:
        """For one job."""
        return next(self._keys)

    def start(self, key: int, job: Any, sink: Sink) -> None:
        """Hand a job over. Raises ModelError when the worker is closed."""
        while not self._living().start(key, job, sink):
            pass  # it ended just now

    def cancel(self, key: int) -> None:
        child = self._child
        if child is not None:
            child.send(("cancel", key))

    @property
    def running(self) -> int:
        """Jobs that were handed over and have not come back, cancelled ones included."""
        child = self._child
        return len(child.sinks) if child is not None else 0

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        child = self._child
        return child.process.pid if child is not None and child.process is not None else None

    def close(self) -> None:
        """End the process. Idempotent."""
        with self._lock:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            child.end()
        atexit.unregister(self.close)

    def retire(self) -> None:
        """Take no more jobs, and close with the end of the last that was handed over."""
        with self._lock:
            self._closed = True
            child = self._child
        if child is None:
            self.close()
        else:
            child.when_idle(self.close)

    def _living(self) -> _Child:
        with self._lock:
            if self._closed:
                raise ModelError("The engine is closed.", "Load the model again.")
            if self._child is None or self._child.over:
                if self._child is not None:
                    log.info("Starting %s again.", self._title)
                self._child = _Child(self._target, self._arguments, self._title, isolated=self._isolated)
            return self._child


class _Child:
    """One run of the process: from its start to its end, whichever way that comes."""

    def __init__(self, target: str, arguments: dict[str, Any], title: str, *, isolated: bool) -> None:
        self._title = title
        self.sinks: dict[int, Sink] = {}
        self._when_idle: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._closing = False
        self._sending = threading.Lock()
        self.ready, self.ended = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self._connection, theirs = Pipe()
        self.process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] = TemporaryFile()  # noqa: SIM115  # open as long as the process lives
        if isolated:
            self.process = _spawn(theirs, self._log)
            theirs.close()
        else:
            threading.Thread(target=_serve, args=[theirs], name=f"calpaca-{title}", daemon=True).start()
        self._connection.send((target, arguments))
        self._reader = threading.Thread(target=self._read, name=f"calpaca-{title}-reader", daemon=True)
        self._reader.start()

    @property
    def over(self) -> bool:
        """Whether it takes no more jobs."""
        return self.error is not None or self.ended.is_set()

    def start(self, key: int, job: Any, sink: Sink) -> bool:
        """Whether the job was handed over: not to a process that has ended."""
        with self._lock:
            if self.over:
                return False
            self.sinks[key] = sink
        self.send(("start", key, job))
        return True

    def when_idle(self, action: Callable[[], None]) -> None:
        """Have something done once no job is under way, in a thread that it may hold up."""
        with self._lock:
            self._when_idle = action
        self._tell_idle()

    def _tell_idle(self) -> None:
        with self._lock:
            if self.sinks or self._when_idle is None:
                return
            action, self._when_idle = self._when_idle, None
        threading.Thread(target=action, name=f"calpaca-{self._title}-end", daemon=True).start()

    def send(self, message: Any) -> None:
        """A process that has just ended cannot be told; the reader finds out and tells everybody."""
        with self._sending, suppress(OSError):
            self._connection.send(message)

    def _read(self) -> None:
        try:
            while (message := self._connection.recv()) is not None:
                self._dispatch(*message)
        except (EOFError, OSError):
            pass
        self._finish()

    def _dispatch(self, kind: str, content: Any) -> None:
        if kind == "ready":
            self.ready.set()
            return
        if kind == "failed":
            self.error, content = content
        for key, payload, last in content:
            self._deliver(key, payload, last)

    def _deliver(self, key: int, payload: Any, last: bool) -> None:
        with self._lock:
            sink = self.sinks.pop(key, None) if last else self.sinks.get(key)
        if sink is None:
            return
        if isinstance(payload, Exception):
            sink.fail(payload)
        elif payload is not None:
            sink.take(payload)
        if last:
            self._tell_idle()

    def _finish(self) -> None:
        """The process is gone: whoever waits learns why."""
        if self.process is not None:
            self._reap()
        self.error = self.error or ModelError(
            f"{self._title} ended unexpectedly ({self._how()}).",
            self._last_line() or "It is started again when needed.",
        )
        with self._lock:
            self.ended.set()
            left, self.sinks = self.sinks, {}
        self.ready.set()
        for sink in left.values():
            if self._closing:
                sink.cancel()
            else:
                sink.fail(self.error)
        self._log.close()
        self._tell_idle()

    def _reap(self) -> None:
        assert self.process is not None
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _how(self) -> str:
        code = self.process.returncode if self.process is not None else None
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}" if code is not None else "closed"

    def _last_line(self) -> str:
        """The last thing that the process wrote, where it wrote anything."""
        self._log.seek(0)
        lines = [
            line.strip() for line in self._log.read()[-4000:].decode(errors="replace").splitlines() if line.strip()
        ]
        return f"It is started again when needed. Its last words: {lines[-1][:300]}" if lines else ""

    def end(self) -> None:
        self._closing = True
        self.send(None)
        if threading.current_thread() is not self._reader:
            self._reader.join(2 * _PATIENCE)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        self._connection.close()


def _spawn(theirs: Connection, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """An interpreter that serves the other end of a pipe. What it prints goes to `log`: standard output is not its."""
    descriptor = theirs.fileno()
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(  # noqa: S603  # our own interpreter
        [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({descriptor})"],
        stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[descriptor], start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip


# In the process ----------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """The whole life of the process. It ends at once: tearing down an interpreter with torch in it takes seconds."""
    _serve(Connection(descriptor))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _serve(connection: Connection) -> None:
    with suppress(EOFError, OSError), connection:  # the caller is gone, or has heard enough
        try:
            runner = _open(*connection.recv())
        except Exception as error:
            connection.send(("failed", (_picklable(error), [])))
            return
        connection.send(("ready", []))
        try:
            _work(connection, runner)
        finally:
            runner.close()
        connection.send(None)


def _open(target: str, arguments: Mapping[str, Any]) -> Runner:
    module, _, attribute = target.partition(":")
    opener: Callable[..., Runner] = getattr(import_module(module), attribute)
    return opener(**arguments)


def _work(connection: Connection, runner: Runner) -> None:
    """Listen while there is nothing to do; otherwise look at the pipe between two steps, and answer once for each."""
    while True:
        events: list[Event] = []
        while connection.poll(0 if runner.busy or events else None):
            message = connection.recv()
            if message is None:
                return
            events += _obey(runner, *message)
        try:
            events += runner.step() if runner.busy else []
        except Exception as error:
            events += error.events if isinstance(error, BrokenError) else []
            connection.send(("failed", (_picklable(error), events)))
            return
        if events:
            connection.send(("events", events))


def _obey(runner: Runner, command: str, key: int, job: Any = None) -> list[Event]:
    if command == "cancel":
        runner.cancel(key)
        return []
    try:
        runner.start(key, job)
    except Exception as error:
        return [(key, _picklable(error), True)]
    return []


def _picklable(error: Exception) -> Exception:
    """Errors of ours as they are, a library's as a ModelError."""
    if isinstance(error, CalpacaError):
        return error
    return ModelError(f"The engine failed: {reason(error)}", "Try --engine transformers.")


def reason(error: Exception) -> str:
    """The last line of a library's message, without the place in its sources that it begins with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^.*\.(?:cc|cpp|h|hpp):\d+:?\s*", "", lines[-1]) if lines else type(error).__name__
