"""A run: requests under way, replies read in their order, rows through the filters, until enough or a limit is reached.

Request n is made when the reply to request n - `in_flight` has been read. What it asks therefore depends on nothing but
earlier replies, and these are in the job ledger: a run that was killed asks again for what was under way, and for
nothing else.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from calpaca.core.engine import Completion, Handle, Sampling, Usage
from calpaca.core.errors import CalpacaError, JobError, UnsupportedError
from calpaca.core.jobs import Job, step_key
from calpaca_crawl.attempts import Attempts
from calpaca_crawl.budget import Spending
from calpaca_crawl.filters import Filters
from calpaca_crawl.generator import Generator
from calpaca_crawl.kept import KeptRow, row_id
from calpaca_crawl.methods import Method
from calpaca_crawl.scorer import Scorer
from calpaca_crawl.task import Draft, Refused, Task

KIND = "crawl_instructions"
_FAILURES_IN_A_ROW = 5
_BARREN_IN_A_ROW = 6
"""After so many replies without one new row the sampling is changed."""
_HEATS = 3
_HEATING = 0.25
_OTHER_SEEDS = 1_000_003


@dataclass(frozen=True)
class Rejected:
    """A record that became no row."""

    reason: str
    method: str
    request: int
    record: Any

    def written(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Reply:
    """What the ledger keeps of a request."""

    text: str
    cut: bool
    prompt_tokens: int
    completion_tokens: int
    time: str

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens)


@dataclass
class _Asked:
    """A request under way, or one whose reply the ledger has."""

    number: int
    task: Task
    generator: Generator
    sampling: Sampling
    key: str
    recorded: bytes | None = None
    handle: Handle | None = None
    reserved: Usage = field(default_factory=Usage)


@dataclass
class Run:
    """Makes rows. Read `kept`, `rejected` and `stopped` (why it ended) once `rows()` is through."""

    generators: Sequence[Generator]
    methods: Mapping[str, Method]
    filters: Filters
    sampling: Sampling
    spending: Spending
    job: Job
    attempts: Attempts
    in_flight: int = 8
    scorer: Scorer | None = None
    after_reply: Callable[[], None] = lambda: None
    kept: list[KeptRow] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    replies: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    stopped: str = ""
    heat: int = 0
    _number: int = 0
    _asked_by: Counter[str] = field(default_factory=Counter)
    _open: list[str] = field(default_factory=list)
    _barren: int = 0
    _failed_in_a_row: int = 0

    def rows(self) -> Iterator[KeptRow]:
        """The rows, each as soon as it is kept.

        Raises JobError when requests fail or bring nothing new time after time; what is kept until then stays.
        """
        self._open = list(self.methods)
        self.spending.lost = sum(self.attempts.lost(), self.spending.lost)
        pending: deque[_Asked] = deque()
        try:
            while self._fill(pending):
                yield from self._read(pending.popleft())
        finally:
            for asked in pending:
                if asked.handle is not None:
                    asked.handle.cancel()
                    self.spending.lose(asked.reserved)

    # Asking --------------------------------------------------------------------------------------------------------
    def _fill(self, pending: deque[_Asked]) -> bool:
        """Have `in_flight` requests under way, if there is more to ask and room for it. False: none is left."""
        if self._enough():
            self.stopped = "max_rows"
        while not self.stopped and len(pending) < self.in_flight and self._open:
            asked = self._next()
            if asked is None:
                continue
            if not self._start(asked):
                break
            pending.append(asked)
        if not pending and not self._open:
            self.stopped = self.stopped or "all_asked"
        return bool(pending) and self.stopped not in {"max_rows", "max_time"}

    def _enough(self, more: int = 0) -> bool:
        """Whether as many rows are kept as are wanted, when `more` will be."""
        most = self.spending.budget.max_rows
        return most is not None and len(self.kept) + more >= most

    def _next(self) -> _Asked | None:
        """The next request, of the methods in turn; None when its method has no more to ask."""
        name = self._open[self._number % len(self._open)]
        task = self.methods[name].task(self._asked_by[name], self.kept)
        if task is None:
            self._open.remove(name)
            return None
        number, self._number = self._number, self._number + 1
        self._asked_by[name] += 1
        generator = self.generators[number % len(self.generators)]
        sampling = self._heated(number, generator)
        key = step_key(
            KIND, model=generator.model.fingerprint, prompt=task.prompt, schema=task.schema, number=number,
            sampling=asdict(sampling),
        )  # fmt: skip
        return _Asked(number, task, generator, sampling, key)

    def _heated(self, number: int, generator: Generator) -> Sampling:
        """Sampling with a seed of the request's own; hotter, and with other seeds, once the model repeats itself."""
        hotter = max(self.sampling.temperature, 0.5) + _HEATING * self.heat
        temperature = hotter if self.heat else self.sampling.temperature
        seed = None
        if temperature > 0.0 and generator.takes_seeds():
            seed = (self.sampling.seed or 0) + number + _OTHER_SEEDS * self.heat
        return replace(self.sampling, temperature=temperature, seed=seed)

    def _start(self, asked: _Asked) -> bool:
        """Send a request unless the ledger has its reply. False where a limit leaves no room for it."""
        asked.recorded = self.job.ledger.get_many([asked.key]).get(asked.key)
        if asked.recorded is not None:
            asked.reserved = _Reply(**json.loads(asked.recorded)).usage
        else:
            prompt_tokens = asked.generator.prompt_tokens(asked.task)
            asked.reserved = Usage(prompt_tokens, asked.sampling.max_new_tokens or 512)
        self.stopped = self.spending.refusal(asked.reserved) or ""
        if self.stopped:
            return False
        self.spending.reserve(asked.reserved)
        if asked.recorded is None:
            self.attempts.note(asked.key, asked.reserved)
            asked.handle = self._submitted(asked)
        return True

    def _submitted(self, asked: _Asked) -> Handle:
        try:
            return asked.generator.submit(asked.task, asked.sampling)
        except CalpacaError as error:
            failed = Handle()
            failed.fail(error)
            return failed

    # Reading -------------------------------------------------------------------------------------------------------
    def _read(self, asked: _Asked) -> Iterator[KeptRow]:
        try:
            reply = self._reply(asked)
        except TimeoutError:
            self.spending.lose(asked.reserved)
            self.stopped = "max_time"
            return
        except CalpacaError as error:
            self.spending.lose(asked.reserved)
            self._note_failure(asked, error)
            return
        self._failed_in_a_row = 0
        self.replies += 1
        self.spending.settle(asked.reserved, reply.usage)
        before = len(self.kept)
        yield from self._kept_of(asked, reply)
        self.after_reply()
        self._note_yield(len(self.kept) - before)

    def _reply(self, asked: _Asked) -> _Reply:
        """The recorded reply, or the one that is waited for and then recorded."""
        ((_, value),) = self.job.steps(KIND, [asked.key], lambda _: {0: self._received(asked)})
        return _Reply(**json.loads(value))

    def _received(self, asked: _Asked) -> bytes:
        assert asked.handle is not None
        try:
            completion = self._wait(asked.handle)
        except UnsupportedError:
            if not asked.generator.constrained or asked.task.schema is None:
                raise
            asked.generator.constrained = False  # a server that does not know schemas is asked without one
            completion = self._wait(self._submitted(asked))
        reply = _Reply(
            completion.text,
            completion.finish_reason == "length",
            completion.usage.prompt_tokens,
            completion.usage.completion_tokens,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return json.dumps(asdict(reply), ensure_ascii=False).encode()

    def _wait(self, handle: Handle) -> Completion:
        """Raises TimeoutError when the run's time is over."""
        left = self.spending.seconds_left()
        try:
            return handle.result(None if left == float("inf") else max(left, 0.0))
        except TimeoutError:
            with suppress(CalpacaError):
                handle.cancel()
            raise

    def _kept_of(self, asked: _Asked, reply: _Reply) -> Iterator[KeptRow]:
        """The rows of a reply that pass the filters and, where there is a scorer, its score; no more than are wanted."""
        passed: list[Draft] = []
        for draft in asked.task.drafts(reply.text, cut=reply.cut):
            if isinstance(draft, Refused):
                self._reject(draft.reason, asked, draft.record)
            elif not self._enough(len(passed) if self.scorer is None else 0):
                reason = self.filters.reason(draft.row)
                if reason is None:
                    passed.append(draft)
                else:
                    self._reject(reason, asked, draft.row.written("alpaca"))
        for draft in passed if self.scorer is None else self._scored(passed, asked):
            row = KeptRow(row_id(draft.row), draft.row, self._provenance(draft, asked, reply))
            self.kept.append(row)
            yield row

    def _scored(self, drafts: Sequence[Draft], asked: _Asked) -> Iterator[Draft]:
        """Those that the scorer finds good enough, until there are enough of them."""
        assert self.scorer is not None
        scores = self.scorer.scores([draft.row for draft in drafts])
        for draft, score in zip(drafts, scores, strict=True):
            if score is None:
                self._reject("not_scored", asked, draft.row.written("alpaca"))
            elif score < self.scorer.least:
                self._reject("low_score", asked, {**draft.row.written("alpaca"), "score": score})
            elif not self._enough():
                yield replace(draft, details={**draft.details, "score": score, "scorer": self.scorer.name})

    def _reject(self, reason: str, asked: _Asked, record: Any) -> None:
        self.rejected.append(Rejected(reason, asked.task.method, asked.number, record))

    def _provenance(self, draft: Draft, asked: _Asked, reply: _Reply) -> dict[str, Any]:
        model = asked.generator.model
        return {
            "method": asked.task.method,
            "request": asked.number,
            "model": model.name,
            "fingerprint": model.fingerprint,
            "prompt": step_key("prompt", text=asked.task.prompt)[:16],
            "temperature": asked.sampling.temperature,
            "seed": asked.sampling.seed,
            "parents": list(asked.task.parents),
            **asked.task.details,
            **draft.details,
            "time": reply.time,
        }

    # Giving up -----------------------------------------------------------------------------------------------------
    def _note_failure(self, asked: _Asked, error: CalpacaError) -> None:
        self.failures[type(error).__name__] += 1
        self._failed_in_a_row += 1
        self._reject("request_failed", asked, error.message)
        if self._failed_in_a_row >= _FAILURES_IN_A_ROW:
            self.stopped = "requests_fail"
            raise JobError(
                f"{self._failed_in_a_row} requests one after the other failed, the last with: {error.message}",
                f"{error.hint} Give the same command again to go on.".strip(),
            ) from error

    def _note_yield(self, rows: int) -> None:
        """Change the sampling where replies bring nothing new, and stop where that does not help."""
        self._barren = 0 if rows else self._barren + 1
        if self._barren < _BARREN_IN_A_ROW + self.in_flight * (self.heat > 0):  # those under way are as cold as before
            return
        last = Counter(each.reason for each in self.rejected[-4 * self._barren :]).most_common(1)
        reason = last[0][0] if last else "no rows"
        if self.heat >= _HEATS:
            self.stopped = "nothing_new"
            raise JobError(
                f"The last {self._barren} replies brought no new row, most of them for the reason '{reason}', although "
                "temperature and seeds were changed.",
                "Use another model, method or topics; the file of rejected records shows what came.",
            )
        self.heat, self._barren = self.heat + 1, 0
