"""The job ledger: one place where long work records what it finished, so that a kill loses at most the step in hand.

A *step* is a piece of work named by the content of everything it depends on (`step_key`); its result is bytes. A step
that is in the ledger is never done again, whichever job asks. A *job* is a run that a person started: it has a kind,
parameters to start it again with, a state and counts. Both live in one SQLite file in WAL mode, so several processes
may work at once and a crash leaves a readable file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calpaca.core.errors import CalpacaError, JobError, unknown_name

State = Literal["running", "interrupted", "done", "failed", "cancelled"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS steps (key TEXT PRIMARY KEY, kind TEXT NOT NULL, value BLOB NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, title TEXT NOT NULL, parameters TEXT NOT NULL, state TEXT NOT NULL,
    done INTEGER NOT NULL DEFAULT 0, reused INTEGER NOT NULL DEFAULT 0, total INTEGER, message TEXT NOT NULL DEFAULT '',
    pid INTEGER NOT NULL, pid_started REAL NOT NULL, created REAL NOT NULL, updated REAL NOT NULL
);
"""


class JobCancelled(CalpacaError):  # noqa: N818  # what a person did, no fault
    """The work was cancelled between two steps."""

    exit_code = 130


@dataclass(frozen=True)
class JobRecord:
    """A job as the ledger knows it. `done` steps were finished, `reused` of them were there already."""

    id: str
    kind: str
    title: str
    parameters: Mapping[str, Any]
    state: State
    done: int
    reused: int
    total: int | None
    message: str
    created: float
    updated: float


def step_key(kind: str, **inputs: Any) -> str:
    """sha256 over the kind and all inputs (JSON values) of a step."""
    text = json.dumps([kind, inputs], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def id_of_job(kind: str, parameters: Mapping[str, Any]) -> str:
    """The id of the job of this kind with these parameters, also before it was ever started."""
    return step_key(kind, parameters=dict(parameters))[:12]


class Ledger:
    """Jobs and steps in one SQLite file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._local = threading.local()
        with self._connection() as connection:
            connection.executescript(_SCHEMA)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection in a transaction. A full disk or a damaged file is a JobError."""
        try:
            connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = sqlite3.connect(self.path, timeout=30)
                connection.execute("PRAGMA journal_mode=WAL")
                # What is committed outlives the process; only a power cut may take the last steps, and they are done again.
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.row_factory = sqlite3.Row
            with connection:
                yield connection
        except sqlite3.Error as error:
            raise JobError(
                f"The job ledger {self.path} cannot be used: {error}.",
                "Free disk space or check the permissions; CALPACA_DATA moves it.",
            ) from error

    # Steps ---------------------------------------------------------------------------------------------------------
    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Results of those of `keys` that are finished."""
        with self._connection() as connection:
            rows = connection.execute(
                "SELECT key, value FROM steps WHERE key IN (SELECT value FROM json_each(?))", (json.dumps(list(keys)),)
            )
            return {row["key"]: row["value"] for row in rows}

    def put_many(self, kind: str, results: Mapping[str, bytes]) -> None:
        """Record finished steps, all or none."""
        now = time.time()
        with self._connection() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO steps VALUES (?, ?, ?, ?)",
                [(key, kind, value, now) for key, value in results.items()],
            )

    # Jobs ----------------------------------------------------------------------------------------------------------
    def start(self, kind: str, title: str, parameters: Mapping[str, Any]) -> Job:
        """Begin a job. The same kind and parameters give the same job, which is then started again.

        Raises JobError when it is running in another process.
        """
        job_id = id_of_job(kind, parameters)
        now = time.time()
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is not None and _state(row) == "running":
                raise JobError(f"Job {job_id} is running already, in process {row['pid']}.", "Wait for it, or stop it.")
            connection.execute(
                "INSERT INTO jobs (id, kind, title, parameters, state, pid, pid_started, created, updated)"
                " VALUES (?, ?, ?, ?, 'running', ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET state='running', done=0,"
                " reused=0, total=NULL, message='', pid=excluded.pid, pid_started=excluded.pid_started, updated=excluded.updated",
                (
                    job_id,
                    kind,
                    title,
                    json.dumps(dict(parameters), ensure_ascii=False),
                    os.getpid(),
                    _started(os.getpid()),
                    now,
                    now,
                ),
            )
        return Job(self, job_id)

    def jobs(self) -> list[JobRecord]:
        """All jobs, the newest first."""
        with self._connection() as connection:
            rows = connection.execute("SELECT * FROM jobs ORDER BY updated DESC").fetchall()
        return [_record(row) for row in rows]

    def get(self, job_id: str) -> JobRecord:
        """The job with this id or a unique beginning of it. Raises JobError when there is none or several."""
        matches = [record for record in self.jobs() if record.id.startswith(job_id)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise JobError(
                f"'{job_id}' begins {len(matches)} job ids.", f"Which one: {', '.join(r.id for r in matches)}?"
            )
        raise JobError(*unknown_name("job", job_id, [record.id for record in self.jobs()]))

    def update(self, job_id: str, **columns: Any) -> None:
        """Set columns of a job's row."""
        assignments = ", ".join(f"{name} = ?" for name in columns)
        with self._connection() as connection:
            connection.execute(
                f"UPDATE jobs SET {assignments}, updated = ? WHERE id = ?",  # noqa: S608  # names from our own code
                (*columns.values(), time.time(), job_id),
            )


class Job:
    """A run in hand: does steps that are not in the ledger, counts them, and ends in a recorded state.

    A context manager: an exception inside records `failed`, JobCancelled and KeyboardInterrupt record `cancelled`.
    """

    def __init__(self, ledger: Ledger, job_id: str) -> None:
        self.ledger = ledger
        self.id = job_id
        self.done = 0
        self.reused = 0
        self.total: int | None = None
        self._cancelled = threading.Event()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            self._save("done")
            return
        with suppress(JobError):  # a disk that is full must not hide the error that says so
            self._save_failure(error)

    def _save_failure(self, error: BaseException) -> None:
        if isinstance(error, JobCancelled | KeyboardInterrupt | GeneratorExit):
            self._save("cancelled", "Cancelled between two steps; `calpaca jobs resume` goes on from there.")
        else:
            self._save("failed", str(error) or type(error).__name__)

    def _save(self, state: State, message: str = "") -> None:
        self.ledger.update(self.id, state=state, message=message, done=self.done, reused=self.reused, total=self.total)

    def cancel(self) -> None:
        """Stop before the next step."""
        self._cancelled.set()

    def expect(self, total: int) -> None:
        """Say how many steps there will be."""
        self.total = total
        self._save("running")

    def steps(
        self,
        kind: str,
        keys: Sequence[str],
        work: Callable[[list[int]], Mapping[int, bytes]],
        batch_size: int = 1,
    ) -> Iterator[tuple[int, bytes]]:
        """Results of the steps `keys`, as (position, bytes), those of the ledger first.

        `work` gets positions of steps that are missing, at most `batch_size` at a time, and returns their results,
        which are recorded before they are given out. Raises JobCancelled between two batches.
        """

        def batches(missing: list[int]) -> Generator[Mapping[int, bytes]]:
            for start in range(0, len(missing), batch_size):
                yield work(missing[start : start + batch_size])

        return self.steps_as_finished(kind, keys, batches)

    def steps_as_finished(
        self, kind: str, keys: Sequence[str], work: Callable[[list[int]], Generator[Mapping[int, bytes]]]
    ) -> Iterator[tuple[int, bytes]]:
        """As `steps`, for work that has many steps under way at once.

        `work` gets the positions of all missing steps and gives results as they are finished, in any order; each
        mapping is recorded as one. Raises JobCancelled before the next one is asked for.
        """
        found = self.ledger.get_many(list(dict.fromkeys(keys)))
        self.reused += sum(key in found for key in keys)
        self.done += sum(key in found for key in keys)
        yield from ((position, found[key]) for position, key in enumerate(keys) if key in found)
        missing: dict[str, list[int]] = {}
        for position, key in enumerate(keys):
            if key not in found:
                missing.setdefault(key, []).append(position)
        with closing(work([positions[0] for positions in missing.values()])) as finished:
            for results in self._until_cancelled(finished):
                self.ledger.put_many(kind, {keys[position]: value for position, value in results.items()})
                self.done += sum(len(missing[keys[position]]) for position in results)
                self._save("running")
                for position, value in results.items():
                    yield from ((same, value) for same in missing[keys[position]])

    def _until_cancelled(self, finished: Iterator[Mapping[int, bytes]]) -> Iterator[Mapping[int, bytes]]:
        while True:
            if self._cancelled.is_set():
                raise JobCancelled("The job was cancelled.", f"Go on with: calpaca jobs resume {self.id}")
            results = next(finished, None)
            if results is None:
                return
            yield results


def _record(row: sqlite3.Row) -> JobRecord:
    return JobRecord(
        id=row["id"], kind=row["kind"], title=row["title"], parameters=json.loads(row["parameters"]), state=_state(row),
        done=row["done"], reused=row["reused"], total=row["total"], message=row["message"],
        created=row["created"], updated=row["updated"],
    )  # fmt: skip


def _state(row: sqlite3.Row) -> State:
    """The recorded state; a job that says running while its process is gone was interrupted."""
    state: State = row["state"]
    if state == "running" and not _alive(row["pid"], row["pid_started"]):
        return "interrupted"
    return state


def _alive(pid: int, started: float) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's process: it lives
    return _started(pid) == started


def _started(pid: int) -> float:
    """When a process began, in the system's own units, so that a reused pid is not taken for the old process.

    0.0 on systems without /proc, where the pid alone decides.
    """
    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0.0
