"""Work of this plugin that the job ledger records: a handle that every mode of it shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from calpaca.core.events import Event
from calpaca.core.jobs import Job, JobRecord, id_of_job
from calpaca.core.runtime import Runtime

KIND = "retrieval_qa"
"""The app's name: `calpaca jobs resume` starts it again with the recorded options."""


class RecordedWork:
    """A JobRunner: `work` is given the job and yields events, the last one a Result; `prepare` comes before it starts."""

    def __init__(
        self,
        runtime: Runtime,
        title: str,
        parameters: Mapping[str, Any],
        work: Callable[[Job], Iterator[Event]],
        prepare: Callable[[], Iterator[Event]] = lambda: iter(()),
    ) -> None:
        self._runtime = runtime
        self._title = title
        self._parameters = dict(parameters)
        self._work = work
        self._prepare = prepare
        self._job: Job | None = None

    @property
    def id(self) -> str:
        return id_of_job(KIND, self._parameters)

    def status(self) -> JobRecord:
        """Raises JobError before the job has begun once."""
        return self._runtime.jobs.get(self.id)

    def cancel(self) -> None:
        """Stop between two steps."""
        if self._job is not None:
            self._job.cancel()

    def events(self) -> Iterator[Event]:
        """Do what is not done yet."""
        yield from self._prepare()
        with self._runtime.jobs.start(KIND, self._title, self._parameters) as job:
            self._job = job
            yield from self._work(job)
