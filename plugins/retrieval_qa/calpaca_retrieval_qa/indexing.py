"""The job `retrieval_index`: builds or updates an index ahead of the first question."""

from __future__ import annotations

from collections.abc import Iterator

from calpaca.core.events import Event, Result
from calpaca.core.jobs import Job, JobRecord, id_of_job
from calpaca.core.runtime import Runtime
from calpaca_retrieval_qa.options import RetrievalIndexOptions, RetrievalQAOptions

KIND = "retrieval_index"


def start_job(options: RetrievalIndexOptions | RetrievalQAOptions, runtime: Runtime) -> Job:
    """Begin the indexing of these documents in the ledger. Raises JobError when it is running elsewhere."""
    names = options.collection or ", ".join(str(path) for path in options.files)
    return runtime.jobs.start(KIND, f"Index {names}", options.job_parameters(options.embedding))


class IndexingJob:
    """A handle on indexing. `events` does the work; a run that was cut short is taken up where it ended."""

    def __init__(self, options: RetrievalIndexOptions, runtime: Runtime) -> None:
        self._options = options
        self._runtime = runtime
        self._index = options.index(runtime, options.embedding)
        self._job: Job | None = None

    @property
    def id(self) -> str:
        return id_of_job(KIND, self._options.job_parameters(self._options.embedding))

    def status(self) -> JobRecord:
        """Raises JobError before the job has begun once."""
        return self._runtime.jobs.get(self.id)

    def cancel(self) -> None:
        """Stop between two batches."""
        if self._job is not None:
            self._job.cancel()

    def _start(self) -> Job:
        self._job = start_job(self._options, self._runtime)
        return self._job

    def events(self) -> Iterator[Event]:
        """Progress and notices, then a Result: where the index lies, its chunks, what was embedded for it, and which
        files of a folder failed, with the reason. Those do not fail the job; when no file can be read, it fails.
        """
        yield from self._index.sync(self._start)
        job = self._job
        yield Result(
            {
                "folder": str(self._index.folder),
                "chunks": len(self._index),
                "files": len(self._index.manifest.files()),
                "embedded": job.done - job.reused if job is not None else 0,
                "reused": job.reused if job is not None else 0,
                "failed": {str(path): error.message for path, error in self._index.failed.items()},
                "job": self.id,
            }
        )


def build(options: RetrievalIndexOptions, runtime: Runtime) -> IndexingJob:
    """Raises UsageError without documents, DocumentError for a missing one."""
    return IndexingJob(options, runtime)
