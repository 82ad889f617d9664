"""Native libraries in a process of their own: crashes, endings, and what a caller sees of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from calpaca.core.engines.process import Worker
from calpaca.core.engines.workers import Workers
from calpaca.core.errors import AdapterError, ModelError, UsageError
from calpaca.core.files import AdapterFiles

RUNNER = """
    import os, sys, time
    from calpaca.core.errors import UsageError

    class Echo:
        '''Counts for each job as far as it asks; some words make it misbehave.'''

        def __init__(self, greeting="hello"):
            if greeting == "broken":
                raise RuntimeError("in a place\\n  the weights are broken")
            self.greeting, self.jobs, self.cancelled = greeting, {}, set()

        @property
        def busy(self):
            return bool(self.jobs)

        def start(self, key, job):
            if job == "refused":
                raise UsageError("No.", "Ask otherwise.")
            if job == "print":
                print("noise"); os.system("echo more noise")
            self.jobs[key] = [job, 0]

        def cancel(self, key):
            self.cancelled.add(key)

        def step(self):
            time.sleep(0.005)
            events = []
            for key, state in list(self.jobs.items()):
                job, state[1] = state[0], state[1] + 1
                if job == "abort" and state[1] == 3:
                    print("assertion failed: everything", file=sys.stderr, flush=True)
                    os.abort()
                if job == "raise" and state[1] == 3:
                    raise ValueError("the library is confused")
                last = key in self.cancelled or (job == "short" and state[1] == 3) or job == "print"
                events.append((key, (self.greeting, state[1]), last))
                if last:
                    del self.jobs[key]
            return events

        def close(self):
            pass
"""


class Waiting:
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.payloads: list[Any] = []
        self.error: Exception | None = None
        self.cancelled = False
        self.changed = threading.Event()

    def take(self, payload: Any) -> None:
        self.payloads.append(payload)

    def fail(self, error: Exception) -> None:
        self.error = error
        self.changed.set()

    def cancel(self) -> None:
        self.cancelled = True
        self.changed.set()


def settle(holds: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.01)


def start(worker: Worker, job: str) -> tuple[int, Waiting]:
    key, sink = worker.new_key(), Waiting()
    worker.start(key, job, sink)
    return key, sink


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The target of a runner that needs no library."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "echo_runner.py").write_text(dedent(RUNNER))
    monkeypatch.syspath_prepend(folder)
    return "echo_runner:Echo"


@pytest.fixture(params=[True, False], ids=["process", "thread"])
def worker(request: pytest.FixtureRequest, runner: str) -> Iterator[Worker]:
    worker = Worker(runner, {"greeting": "hello"}, "The engine 'echo'", isolated=request.param)
    yield worker
    worker.close()


@pytest.fixture
def process(runner: str) -> Iterator[Worker]:
    worker = Worker(runner, {}, "The engine 'echo'")
    worker.open()
    yield worker
    worker.close()


def test_jobs_get_their_own_events_and_end(worker: Worker) -> None:
    sinks = [start(worker, "short")[1] for _ in range(3)]
    settle(lambda: worker.running == 0)
    assert [sink.payloads for sink in sinks] == [[("hello", 1), ("hello", 2), ("hello", 3)]] * 3


def test_a_job_that_is_refused_fails_alone(worker: Worker) -> None:
    _, other = start(worker, "short")
    _, refused = start(worker, "refused")
    settle(lambda: worker.running == 0)
    assert isinstance(refused.error, UsageError) and refused.error.hint == "Ask otherwise."
    assert other.error is None and len(other.payloads) == 3


def test_a_cancelled_job_ends(worker: Worker) -> None:
    key, sink = start(worker, "forever")
    settle(lambda: sink.payloads)
    worker.cancel(key)
    worker.cancel(key)
    settle(lambda: worker.running == 0)


def test_what_goes_wrong_while_it_opens_is_raised(runner: str) -> None:
    worker = Worker(runner, {"greeting": "broken"}, "The engine 'echo'")
    with pytest.raises(ModelError, match="the weights are broken"):
        worker.open()
    worker.close()


def test_a_crash_fails_what_runs_and_the_next_job_starts_anew(process: Worker) -> None:
    first = process.pid
    _, bystander = start(process, "forever")
    _, culprit = start(process, "abort")
    settle(lambda: bystander.changed.is_set() and culprit.changed.is_set())
    for sink in (bystander, culprit):
        assert isinstance(sink.error, ModelError)
        assert "The engine 'echo' ended unexpectedly (killed by SIGABRT)" in sink.error.message
        assert "assertion failed: everything" in sink.error.hint
    _, after = start(process, "short")
    settle(lambda: process.running == 0)
    assert len(after.payloads) == 3 and process.pid != first


def test_a_kill_fails_what_runs_and_the_next_job_starts_anew(process: Worker) -> None:
    _, sink = start(process, "forever")
    settle(lambda: sink.payloads)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    settle(sink.changed.is_set)
    assert isinstance(sink.error, ModelError) and "SIGKILL" in sink.error.message
    _, after = start(process, "short")
    settle(lambda: process.running == 0)
    assert len(after.payloads) == 3


def test_no_job_is_lost_between_a_crash_and_its_discovery(process: Worker) -> None:
    for _ in range(5):
        process.open()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        sinks = [start(process, "short")[1] for _ in range(20)]
        settle(lambda: process.running == 0)
        assert all(sink.error is not None or len(sink.payloads) == 3 for sink in sinks)


def test_an_exception_in_a_step_is_told_to_all_and_the_next_job_starts_anew(worker: Worker) -> None:
    _, bystander = start(worker, "forever")
    _, culprit = start(worker, "raise")
    settle(lambda: bystander.changed.is_set() and culprit.changed.is_set())
    assert isinstance(bystander.error, ModelError) and "the library is confused" in bystander.error.message
    _, after = start(worker, "short")
    settle(lambda: worker.running == 0)
    assert len(after.payloads) == 3


def test_closing_cancels_what_runs_and_leaves_no_process(process: Worker) -> None:
    _, sink = start(process, "forever")
    settle(lambda: sink.payloads)
    pid = process.pid
    assert pid is not None
    process.close()
    process.close()
    assert sink.cancelled and sink.error is None
    assert not alive(pid)
    with pytest.raises(ModelError, match="closed"):
        start(process, "short")


def test_a_retired_worker_takes_no_job_and_ends_with_its_last(worker: Worker) -> None:
    worker.open()
    pid = worker.pid
    key, running = start(worker, "forever")
    _, short = start(worker, "short")
    worker.retire()
    with pytest.raises(ModelError, match="closed"):
        start(worker, "short")
    settle(lambda: len(short.payloads) == 3)
    seen = len(running.payloads)
    settle(lambda: len(running.payloads) > seen)  # the other goes on
    worker.cancel(key)
    settle(lambda: worker.running == 0)
    assert running.error is None
    if pid is not None:
        settle(lambda: not alive(pid))


def test_a_retired_worker_without_jobs_ends_at_once(process: Worker) -> None:
    pid = process.pid
    assert pid is not None
    process.retire()
    settle(lambda: not alive(pid))


# Several workers -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["together", "each"])
def workers(request: pytest.FixtureRequest, runner: str) -> Iterator[Workers]:
    """Workers that greet with the names of their adapters; one that is called `broken` does not start."""

    def make(adapters: Sequence[AdapterFiles]) -> Worker:
        greeting = "+".join(adapter.name for adapter in adapters) or "hello"
        return Worker(runner, {"greeting": greeting}, "The engine 'echo'", isolated=False)

    workers = Workers(make([]), make, together=request.param)
    yield workers
    workers.close()


def greeting(workers: Workers, adapter: str | None) -> str:
    with workers.using(adapter) as worker:
        _, sink = start(worker, "short")
    settle(lambda: len(sink.payloads) == 3)
    return str(sink.payloads[0][0])


def adapter(name: str) -> AdapterFiles:
    return AdapterFiles(name, Path(name))


def test_requests_go_to_the_worker_of_their_adapter(workers: Workers, request: pytest.FixtureRequest) -> None:
    assert greeting(workers, None) == "hello"
    workers.load(adapter("red"))
    workers.load(adapter("blue"))
    greeted = [greeting(workers, name) for name in (None, "red", "blue")]
    together = "together" in request.node.name
    assert greeted == (["red+blue"] * 3 if together else ["hello", "red", "blue"])
    workers.unload("red")
    for name in ("red", "green"):
        with pytest.raises(AdapterError, match=f"Unknown adapter '{name}'.* Known: blue"):
            greeting(workers, name)
        with pytest.raises(AdapterError, match="Known: blue"):
            workers.unload(name)
    assert greeting(workers, "blue") == greeted[2]


def test_what_runs_while_workers_change_ends_undisturbed(workers: Workers) -> None:
    workers.load(adapter("red"))
    with workers.using("red") as worker:
        key, running = start(worker, "forever")
    workers.load(adapter("red"))
    workers.load(adapter("blue"))
    workers.unload("red")
    seen = len(running.payloads)
    settle(lambda: len(running.payloads) > seen)
    worker.cancel(key)
    settle(lambda: worker.running == 0)
    assert running.error is None and not running.cancelled


def test_an_adapter_that_fails_to_load_leaves_everything_as_it_was(workers: Workers) -> None:
    with pytest.raises(ModelError, match="the weights are broken"):
        workers.load(adapter("broken"))
    assert greeting(workers, None) == "hello"
    with pytest.raises(AdapterError, match="Unknown adapter 'broken'"):
        greeting(workers, "broken")


def test_after_closing_nothing_is_loaded(workers: Workers) -> None:
    workers.close()
    with pytest.raises(ModelError, match="closed"):
        workers.load(adapter("red"))
    with pytest.raises(ModelError, match="closed"):
        greeting(workers, None)


def test_what_the_process_prints_is_not_the_callers_output(process: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    start(process, "print")
    settle(lambda: process.running == 0)
    assert capfd.readouterr() == ("", "")


CALLER = """
    import sys, time
    from calpaca.core.engines.process import Worker

    class Sink:
        def take(self, payload): print("token", payload[1], flush=True)
        def fail(self, error): print("failed", error, flush=True)
        def cancel(self): pass

    sys.path.insert(0, {folder!r})
    worker = Worker("echo_runner:Echo", {{}}, "The engine")  # at the top level: it must not be run again
    worker.open()
    print("pid", worker.pid, flush=True)
    worker.start(worker.new_key(), "forever", Sink())
    try:
        time.sleep(30)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        time.sleep(0.3)
        print(f"still there {{worker.running}}", flush=True)  # in one piece, whatever the other thread prints
"""


def call(tmp_path: Path) -> tuple[subprocess.Popen[str], int]:
    """A program that uses a worker, and the worker's process."""
    script = tmp_path / "caller.py"
    script.write_text(dedent(CALLER).format(folder=str(tmp_path / "modules")))
    caller = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, process_group=0)
    assert caller.stdout is not None
    pid = int(caller.stdout.readline().split()[1])
    assert caller.stdout.readline().startswith("token")
    return caller, pid


def test_no_process_outlives_a_caller_that_was_killed(runner: str, tmp_path: Path) -> None:
    caller, pid = call(tmp_path)
    caller.kill()
    caller.wait()
    settle(lambda: not alive(pid))
    caller.stdout.close()  # type: ignore[union-attr]


def test_ctrl_c_reaches_the_caller_only_and_its_end_ends_the_process(runner: str, tmp_path: Path) -> None:
    caller, pid = call(tmp_path)
    os.killpg(caller.pid, signal.SIGINT)
    output, _ = caller.communicate(timeout=30)
    assert "interrupted" in output and "failed" not in output and "still there 1" in output
    settle(lambda: not alive(pid))
