"""The job ledger: finished steps survive everything, and are never done twice."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from calpaca.core.errors import JobError
from calpaca.core.jobs import JobCancelled, Ledger, step_key


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "data" / "jobs.sqlite")


def keys(count: int) -> list[str]:
    return [step_key("square", number=number) for number in range(count)]


class Squares:
    """Work that remembers which positions it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, positions: list[int]) -> dict[int, bytes]:
        self.asked += positions
        return {position: str(position**2).encode() for position in positions}


def test_step_keys_depend_on_kind_and_every_input_but_not_on_order() -> None:
    assert step_key("embed", text="a", model="m") == step_key("embed", model="m", text="a")
    assert len({step_key("embed", text="a"), step_key("embed", text="b"), step_key("split", text="a")}) == 3


def test_steps_are_done_once_whichever_job_asks(ledger) -> None:
    work = Squares()
    with ledger.start("one", "One", {}) as job:
        assert dict(job.steps("square", keys(3), work)) == {0: b"0", 1: b"1", 2: b"4"}
    with ledger.start("two", "Two", {}) as job:
        assert dict(job.steps("square", keys(5), work)) == {0: b"0", 1: b"1", 2: b"4", 3: b"9", 4: b"16"}
    assert work.asked == [0, 1, 2, 3, 4]
    record = ledger.get(job.id)
    assert (record.state, record.done, record.reused) == ("done", 5, 3)


def test_equal_steps_of_one_job_are_done_once(ledger) -> None:
    work = Squares()
    with ledger.start("one", "One", {}) as job:
        results = dict(job.steps("square", [keys(1)[0]] * 3, work, batch_size=2))
    assert results == {0: b"0", 1: b"0", 2: b"0"}
    assert work.asked == [0]
    assert ledger.get(job.id).done == 3


def test_steps_are_handed_to_the_work_in_batches(ledger) -> None:
    sizes: list[int] = []

    def work(positions: list[int]) -> dict[int, bytes]:
        sizes.append(len(positions))
        return dict.fromkeys(positions, b"")

    with ledger.start("one", "One", {}) as job:
        list(job.steps("square", keys(10), work, batch_size=4))
    assert sizes == [4, 4, 2]


def test_steps_that_finish_in_another_order_are_recorded_as_they_come(ledger) -> None:
    finished: list[int] = []

    def backwards(missing: list[int]):
        for position in reversed(missing):
            yield {position: str(position).encode()}
            finished.append(position)

    keys = [step_key("square", number=number) for number in (0, 1, 2, 1)]
    with ledger.start("count", "Count", {}) as job:
        given = job.steps_as_finished("square", keys, backwards)
        assert next(given) == (2, b"2")
        assert finished == []
        given.close()
    with ledger.start("count", "Count", {}) as job:
        assert list(job.steps_as_finished("square", keys, backwards)) == [(2, b"2"), (1, b"1"), (3, b"1"), (0, b"0")]
        assert (job.done, job.reused) == (4, 1)


def test_any_number_of_keys_is_looked_up_at_once(ledger) -> None:
    many = keys(50_000)
    ledger.put_many("square", dict.fromkeys(many, b"x"))
    assert len(ledger.get_many(many)) == 50_000


def test_a_failing_step_keeps_those_before_it(ledger) -> None:
    def work(positions: list[int]) -> dict[int, bytes]:
        if positions[0] == 2:
            raise ValueError("two is bad")
        return dict.fromkeys(positions, b"")

    with pytest.raises(ValueError, match="two is bad"), ledger.start("one", "One", {}) as job:
        job.expect(5)
        list(job.steps("square", keys(5), work))
    record = ledger.get(job.id)
    assert (record.state, record.message, record.done, record.total) == ("failed", "two is bad", 2, 5)
    assert len(ledger.get_many(keys(5))) == 2


def test_cancel_stops_before_the_next_batch_and_says_how_to_go_on(ledger) -> None:
    work = Squares()
    with pytest.raises(JobCancelled, match="calpaca jobs resume"), ledger.start("one", "One", {}) as job:
        for _ in job.steps("square", keys(5), work):
            job.cancel()
    assert work.asked == [0]
    assert ledger.get(job.id).state == "cancelled"


def test_ctrl_c_and_a_closed_generator_count_as_cancelled(ledger) -> None:
    with pytest.raises(KeyboardInterrupt), ledger.start("one", "One", {}) as job:
        raise KeyboardInterrupt
    assert ledger.get(job.id).state == "cancelled"

    def events():
        with ledger.start("two", "Two", {}) as inner:
            yield inner.id
            yield "never reached"

    running = events()
    job_id = next(running)
    running.close()
    assert ledger.get(job_id).state == "cancelled"


def test_the_same_kind_and_parameters_are_the_same_job(ledger) -> None:
    with ledger.start("index", "First", {"files": ["a"]}) as first:
        pass
    with ledger.start("index", "Again", {"files": ["a"]}) as second:
        pass
    with ledger.start("index", "Other", {"files": ["b"]}) as third:
        pass
    assert first.id == second.id != third.id
    assert len(ledger.jobs()) == 2


def test_a_job_that_runs_is_not_started_twice(ledger) -> None:
    with ledger.start("index", "First", {}), pytest.raises(JobError, match="running already"):
        ledger.start("index", "Again", {})


def test_jobs_are_found_by_a_unique_beginning_of_their_id(ledger) -> None:
    with ledger.start("index", "Title", {"n": 1}) as job:
        pass
    assert ledger.get(job.id[:4]).title == "Title"
    with pytest.raises(JobError, match="Unknown job 'zzz'"):
        ledger.get("zzz")
    for number in range(20):
        with ledger.start("index", "Title", {"number": number}):
            pass
    with pytest.raises(JobError, match="begins 21 job ids"):
        ledger.get("")


def test_parameters_come_back_as_they_were_given(ledger) -> None:
    with ledger.start("index", "Title", {"files": ["文档.txt"], "k": 4, "none": None}) as job:
        pass
    assert ledger.get(job.id).parameters == {"files": ["文档.txt"], "k": 4, "none": None}


def test_several_threads_may_write_at_once(ledger) -> None:
    def work(number: int) -> None:
        with ledger.start("index", f"Job {number}", {"number": number}) as job:
            names = [step_key("thread", number=number, step=step) for step in range(20)]
            list(job.steps("thread", names, lambda positions: dict.fromkeys(positions, b"x")))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.state for record in ledger.jobs()] == ["done"] * 6


def test_a_damaged_ledger_is_a_clear_error(tmp_path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"this is no database, and long enough to be read as one" * 100)
    with pytest.raises(JobError, match="cannot be used"):
        Ledger(path)


def test_the_ledger_is_readable_with_plain_sqlite(ledger) -> None:
    ledger.put_many("square", {"key": b"value"})
    with sqlite3.connect(ledger.path) as connection:
        assert connection.execute("SELECT value FROM steps").fetchall() == [(b"value",)]
    connection.close()


WORKER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from calpaca.core.jobs import Ledger, step_key

    ledger = Ledger(Path(sys.argv[1]))
    keys = [step_key("square", number=number) for number in range(200)]

    def work(positions):
        time.sleep(0.005)
        return {position: str(position ** 2).encode() for position in positions}

    with ledger.start("squares", "Squares", {}) as job:
        job.expect(len(keys))
        results = dict(job.steps("square", keys, work, batch_size=3))
    Path(sys.argv[2]).write_bytes(b"\\n".join(results[position] for position in range(200)))
""")


def test_kill_9_at_random_moments_loses_at_most_the_step_in_hand(tmp_path) -> None:
    seed = int(os.environ.get("CALPACA_TEST_SEED", random.randrange(2**32)))
    print(f"CALPACA_TEST_SEED={seed}")
    moments = random.Random(seed)
    path, output = tmp_path / "jobs.sqlite", tmp_path / "out"
    command = [sys.executable, "-c", WORKER, str(path), str(output)]
    finished = 0
    for _ in range(4):
        process = subprocess.Popen(command)
        time.sleep(0.15 + moments.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if path.exists():
            ledger = Ledger(path)
            now = len(ledger.get_many(keys(200)))
            assert now >= finished
            finished = now
            assert {record.state for record in ledger.jobs()} <= {"interrupted", "done"}
    assert subprocess.run(command, check=True, timeout=60).returncode == 0
    assert output.read_bytes() == b"\n".join(str(number**2).encode() for number in range(200))
    record = Ledger(path).jobs()[0]
    assert (record.state, record.done) == ("done", 200)
    assert record.reused >= finished


def test_a_reused_process_id_is_not_taken_for_the_old_process(tmp_path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc to tell processes with one id apart")
    ledger = Ledger(tmp_path / "jobs.sqlite")
    job = ledger.start("index", "Title", {})
    assert ledger.get(job.id).state == "running"
    ledger.update(job.id, pid_started=1.0)
    assert ledger.get(job.id).state == "interrupted"
