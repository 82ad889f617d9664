"""The model asked what a strategy wants to know: rounds of prompts at once, the last summary streamed, all answers kept.

An answer in the job ledger is never asked for again. Its key is everything it depends on: the model's contents, the
prompt to the letter, the sampling. So a run goes on where it was killed, and a changed chapter costs its own prompts and
those above it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from queue import SimpleQueue

from calpaca.core.context_summary import longest_fitting
from calpaca.core.engine import Completion, Grammar, Handle, Sampling, Usage
from calpaca.core.events import Event, Progress, Step, Token
from calpaca.core.jobs import Job, step_key
from calpaca.core.model import Model
from calpaca_summarize.plan import Room
from calpaca_summarize.prompts import Prompt
from calpaca_summarize.strategies import Ask, Round, Steps

KIND = "summary"
IN_FLIGHT = 64
"""Requests that are under way at once; the engine batches as many of them as it can."""

_SENTENCES = re.compile(r"(?s).*[.!?。！？…][\"'”’」』）)]*")
_BULLETS = Grammar("regex", r"- [^\n]+(\n- [^\n]+){0,11}")


@dataclass(frozen=True)
class Answer:
    """What a prompt brought.

    `cut`: the answer was longer than it may be. `shown`: the parts that the prompt is for were found, to the letter, in
    the text of the token ids that were sent; `ids` is the sha256 of these (None where a server renders the prompt).
    """

    text: str
    usage: Usage
    cut: bool
    shown: bool
    ids: str | None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, value: bytes) -> Answer:
        fields = json.loads(value)
        return cls(**{**fields, "usage": Usage(**fields["usage"])})


@dataclass(frozen=True)
class Taken:
    """A step that was taken: what was asked, what came, and whether it came from the ledger."""

    ask: Ask[Prompt]
    answer: Answer
    reused: bool


@dataclass(frozen=True)
class _Sent:
    """A request under way, and what its prompt was."""

    ask: Ask[Prompt]
    handle: Handle
    shown: bool
    ids: str | None


class Asker:
    """Asks one model, within the room that was planned. `job` None keeps nothing; `taken` are the steps so far."""

    def __init__(self, model: Model, sampling: Sampling, room: Room, job: Job | None, *, bullets: bool = False) -> None:
        self.model = model
        self.sampling = sampling
        self.room = room
        self.job = job
        self.taken: list[Taken] = []
        self._bullets = bullets and "regex" in model.engine.capabilities().grammars

    def run(self, steps: Steps[Prompt, list[str]], total: int) -> Generator[Event, None, list[str]]:
        """Take the steps of a strategy that will send `total` prompts; returns its summaries."""
        if self.job is not None:
            self.job.expect(total)
        try:
            asks = next(steps)
            while True:
                streamed = len(asks) == 1 and asks[0].last
                taken = yield from self._streamed(asks[0]) if streamed else self._at_once(asks, total)
                self.taken += taken
                asks = steps.send([each.answer.text for each in taken])
        except StopIteration as end:
            summaries: list[str] = end.value
            return summaries

    def _at_once(self, asks: Round[Prompt], total: int) -> Generator[Event, None, list[Taken]]:
        done: dict[int, Taken] = {}
        yield self._progress(0, total)
        for position, value, reused in self._answers(asks):
            done[position] = Taken(asks[position], Answer.from_bytes(value), reused)
            yield self._progress(len(done), total)
        return [done[position] for position in range(len(asks))]

    def _progress(self, done: int, total: int) -> Progress:
        return Progress(len(self.taken) + done, total, "prompt", "Summarizing")

    def _streamed(self, ask: Ask[Prompt]) -> Generator[Event, None, list[Taken]]:
        key = self._key(ask)
        kept = self.job.ledger.get_many([key]).get(key) if self.job is not None else None
        yield Step("summary", 1, 1)
        if kept is None:
            sent, begun = self._send(ask), False
            for chunk in sent.handle:
                text = chunk.text if begun else chunk.text.lstrip()
                begun = begun or bool(text)
                yield Token(text)
            value = self._answer(sent, sent.handle.result()).to_bytes()
        else:
            value = kept
            yield Token(Answer.from_bytes(kept).text)
        if self.job is not None:
            for _ in self.job.steps(KIND, [key], lambda _: {0: value}):
                pass
        return [Taken(ask, Answer.from_bytes(value), kept is not None)]

    def _answers(self, asks: Round[Prompt]) -> Iterator[tuple[int, bytes, bool]]:
        """(position, answer, whether it was there already), those of the ledger first."""
        asked: set[int] = set()

        def work(missing: list[int]) -> Generator[dict[int, bytes]]:
            asked.update(missing)
            return self._work(asks, missing)

        if self.job is None:
            for results in work(list(range(len(asks)))):
                yield from ((position, value, False) for position, value in results.items())
            return
        for position, value in self.job.steps_as_finished(KIND, [self._key(ask) for ask in asks], work):
            yield position, value, position not in asked

    def _work(self, asks: Round[Prompt], positions: Sequence[int]) -> Generator[dict[int, bytes]]:
        """Answers as they come, of requests of which at most IN_FLIGHT are under way."""
        ended: SimpleQueue[Handle] = SimpleQueue()
        running: dict[int, tuple[int, _Sent]] = {}
        waiting = iter(positions)
        try:
            while True:
                for position in waiting:
                    sent = self._send(asks[position])
                    running[id(sent.handle)] = position, sent
                    sent.handle.on_end(ended.put)
                    if len(running) >= IN_FLIGHT:
                        break
                if not running:
                    return
                handle = ended.get()
                position, sent = running.pop(id(handle))
                yield {position: self._answer(sent, handle.result()).to_bytes()}
        finally:
            for _, sent in running.values():
                sent.handle.cancel()

    # One prompt ----------------------------------------------------------------------------------------------------
    def _most(self, ask: Ask[Prompt]) -> int:
        """Longest answer: summaries of a refined text are as long as the last one."""
        return self.room.answer if ask.last or ask.step == "refine" else self.room.note

    def _sampling(self, ask: Ask[Prompt]) -> Sampling:
        return replace(self.sampling, max_new_tokens=self._most(ask))

    def _grammar(self, ask: Ask[Prompt]) -> Grammar | None:
        return _BULLETS if self._bullets and ask.last else None

    def _key(self, ask: Ask[Prompt]) -> str:
        grammar = self._grammar(ask)
        return step_key(
            KIND,
            model=self.model.fingerprint,
            engine=self.model.engine.name,
            prompt=[dict(message) for message in ask.prompt],
            sampling=asdict(self._sampling(ask)),
            grammar=asdict(grammar) if grammar is not None else None,
        )

    def _send(self, ask: Ask[Prompt]) -> _Sent:
        if self.model.engine.capabilities().conversations:
            read, ids = "\n".join(str(message["content"]) for message in ask.prompt), None
        else:
            tokens = self.model.message_ids(ask.prompt)
            read, ids = self.model.engine.decode(tokens), hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
        shown = all(part.text in read for part in ask.parts)
        return _Sent(ask, self.model.chat(ask.prompt, self._sampling(ask), grammar=self._grammar(ask)), shown, ids)

    def _answer(self, sent: _Sent, completion: Completion) -> Answer:
        cut = completion.finish_reason == "length"
        text = completion.text.strip()
        return Answer(
            text if sent.ask.last else self._note(text, sent.ask, cut), completion.usage, cut, sent.shown, sent.ids
        )

    def _note(self, text: str, ask: Ask[Prompt], cut: bool) -> str:
        """An intermediate summary: whole sentences, and no longer than its room also when it is read again."""
        sentences = _SENTENCES.match(text) if cut else None
        text = sentences.group() if sentences else text
        if not self.model.engine.capabilities().token_ids:
            return text
        most = self._most(ask)
        return longest_fitting(text, lambda part: len(self.model.engine.encode(part)) <= most)
