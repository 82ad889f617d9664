"""Answers to many instructions: batched through the engine, kept in the job ledger as they come, given in order.

Where sampling is random, each instruction has a seed of its own that follows from the run's and its place, so that an
answer depends neither on its neighbours nor on a kill in between.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from queue import SimpleQueue
from typing import Any

from calpaca.core.engine import Completion, Handle, Sampling
from calpaca.core.errors import CalpacaError, ContextOverflowError, ModelError, UsageError
from calpaca.core.instructions import Instruction
from calpaca.core.jobs import Job, step_key
from calpaca.core.model import Model
from calpaca.core.template import Message

KIND = "generate"
_FAILURES_IN_A_ROW = 8
"""After so many the engine is taken to be gone; what is wrong with an instruction itself does not count."""


@dataclass(frozen=True)
class Answer:
    """What became of an instruction: its text, or the error that it met."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


class Generation:
    """One run over instructions.

    `wrapped` puts a text into the model's chat template, with `system` before it; else the model continues the text.
    Rows of messages are always wrapped. `in_flight` requests are with the engine at once.
    """

    def __init__(
        self,
        model: Model,
        instructions: Sequence[Instruction],
        sampling: Sampling,
        *,
        wrapped: bool,
        system: str | None = None,
        in_flight: int = 64,
    ) -> None:
        self.model = model
        self.instructions = instructions
        self.sampling = sampling
        self.wrapped = wrapped
        self.system = system
        self.in_flight = in_flight
        self._failed: list[tuple[str, Answer]] = []
        self._failures_in_a_row: list[CalpacaError] = []

    def answers(self, job: Job) -> Iterator[tuple[int, Answer]]:
        """(place, answer) of every instruction in the order of the file, as soon as it can be given.

        An instruction that fails has an answer with an error, which the ledger does not keep: the next run tries it
        again. Raises ModelError when the engine fails time after time.
        """
        job.expect(len(self.instructions))
        return _in_order(self._as_finished(job))

    def submit(self, place: int, sampling: Sampling) -> Handle:
        """Ask one instruction by itself, as the run asks it. Raises CalpacaError where the engine refuses it."""
        asked = self._asked(place)
        return self.model.generate(asked, sampling) if isinstance(asked, str) else self.model.chat(asked, sampling)

    def prompt(self, place: int) -> str:
        """What the model is asked, in its template where that is known here."""
        asked = self._asked(place)
        if isinstance(asked, str):
            return asked
        if self.model.engine.capabilities().conversations:
            return str(asked[-1]["content"])
        return self.model.template.render(asked)

    def _as_finished(self, job: Job) -> Iterator[tuple[int, Answer]]:
        for place, recorded in job.steps_as_finished(KIND, self._keys, self._finished):
            yield from self._failures()
            yield place, Answer(**json.loads(recorded))
        yield from self._failures()

    def _failures(self) -> Iterator[tuple[int, Answer]]:
        while self._failed:
            key, answer = self._failed.pop()
            yield from ((place, answer) for place in self._places[key])

    @cached_property
    def _keys(self) -> list[str]:
        return [self._key(place) for place in range(len(self.instructions))]

    @cached_property
    def _places(self) -> Mapping[str, list[int]]:
        places: dict[str, list[int]] = defaultdict(list)
        for place, key in enumerate(self._keys):
            places[key].append(place)
        return places

    def _key(self, place: int) -> str:
        return step_key(
            KIND, model=self.model.fingerprint, asked=self._asked(place), sampling=asdict(self._sampling(place))
        )

    def _asked(self, place: int) -> str | tuple[Message, ...]:
        asked = self.instructions[place].asked
        messages: tuple[Message, ...] = ({"role": "user", "content": asked},) if isinstance(asked, str) else asked
        if isinstance(asked, str) and not self.wrapped:
            return asked
        return ({"role": "system", "content": self.system}, *messages) if self.system else messages

    def _sampling(self, place: int) -> Sampling:
        """A request's own; greedy answers have no use for a seed, nor has an engine that takes none."""
        if self.sampling.temperature == 0.0:
            return replace(self.sampling, seed=None)
        if self.sampling.seed is None and not self.model.engine.capabilities().seed:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed or 0) + place)

    def _finished(self, places: list[int]) -> Generator[Mapping[int, bytes]]:
        """Answers as they end, with `in_flight` requests under way; those that fail are put aside."""
        waiting = iter(places)
        running: dict[int, Handle] = {}
        ended: SimpleQueue[int] = SimpleQueue()

        def fill() -> None:
            for place in islice(waiting, self.in_flight - len(running)):
                running[place] = self._submitted(place)
                running[place].on_end(partial(_put, ended, place))

        try:
            fill()
            while running:
                handles = {place: running.pop(place) for place in _all_waiting(ended)}
                fill()  # before the answers are recorded, so that the engine does not wait for the disk
                yield self._outcomes(handles)
                self._refuse_to_go_on()
        finally:
            for handle in running.values():
                handle.cancel()

    def _submitted(self, place: int) -> Handle:
        """The request of an instruction; one that the engine refuses has failed already."""
        try:
            return self.submit(place, self._sampling(place))
        except CalpacaError as error:
            handle = Handle()
            handle.fail(error)
            return handle

    def _outcomes(self, handles: Mapping[int, Handle]) -> Mapping[int, bytes]:
        """What the ledger keeps of requests that have ended."""
        kept = {}
        for place, handle in handles.items():
            try:
                answer = _answer(handle.result())
            except CalpacaError as error:
                self._note_failure(error)
                self._failed.append((self._keys[place], Answer(error=str(error))))
            else:
                self._failures_in_a_row.clear()
                kept[place] = json.dumps(asdict(answer), ensure_ascii=False).encode()
        return kept

    def _note_failure(self, error: CalpacaError) -> None:
        if not isinstance(error, ContextOverflowError | UsageError):
            self._failures_in_a_row.append(error)

    def _refuse_to_go_on(self) -> None:
        if len(self._failures_in_a_row) >= _FAILURES_IN_A_ROW:
            last = self._failures_in_a_row[-1]
            raise ModelError(
                f"{len(self._failures_in_a_row)} instructions one after the other failed, the last with: {last.message}",
                f"{last.hint} What is answered is kept: give the same command again.".strip(),
            ) from last


def _put(ended: SimpleQueue[int], place: int, _: Handle) -> None:
    ended.put(place)


def _all_waiting(ended: SimpleQueue[int]) -> list[int]:
    """What is in the queue, at least one."""
    places = [ended.get()]
    while not ended.empty():
        places.append(ended.get())
    return places


def _answer(completion: Completion) -> Answer:
    usage = completion.usage
    return Answer(completion.text, completion.finish_reason, usage.prompt_tokens, usage.completion_tokens)


def _in_order(pairs: Iterable[tuple[int, Answer]]) -> Iterator[tuple[int, Answer]]:
    """Pairs by place, each as soon as all before it are there."""
    early: list[tuple[int, Any]] = []
    due = 0
    for pair in pairs:
        heapq.heappush(early, pair)
        while early and early[0][0] == due:
            yield heapq.heappop(early)
            due += 1
