"""A session and the model that answers it: each question fitted into the context, each answer kept as it comes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from typing import Any

from calpaca.core.context import ContextPolicy, FittedMessages, fit
from calpaca.core.engine import Chunk, Handle, Sampling
from calpaca.core.errors import CalpacaError
from calpaca.core.events import ContextReport, Event, Notice, Result, Token, UsageReport
from calpaca.core.model import Model
from calpaca.core.sessions import AnswerInHand, Session


class Conversation:
    """What is said in a session, with one model. `policy` says what happens to turns that the context has no room for."""

    def __init__(self, session: Session, model: Model, sampling: Sampling, policy: ContextPolicy = "drop") -> None:
        self.session = session
        self.model = model
        self.sampling = sampling
        self.policy = policy
        self._handle: Handle | None = None

    def begin_anew(self) -> None:
        """Stand after the system text again, so that the next question is answered by itself."""
        first = next(iter(self.session.path()), None)
        self.session.go_to(first.id if first is not None and first.role == "system" else None)

    def ask(self, question: str) -> Generator[Event]:
        """The answer as it comes, then what it took. A question that cannot be answered leaves the conversation as it was.

        Closing the generator stops the answer; what was written of it stays, marked as not complete. Raises ModelError.
        """
        before = self.session.head
        self.session.add("user", question)
        try:
            yield from self.answer()
        except CalpacaError:
            if self.session.path()[-1].role == "user":  # not a word of an answer
                self.session.go_to(before)
            raise

    def answer(self) -> Generator[Event]:
        """An answer to the conversation as it stands, or another one. As `ask`."""
        fitted = fit(self.model, self.session.messages(), self.policy, max_new_tokens=self.sampling.max_new_tokens)
        handle = self._handle = self.model.chat(fitted.messages, self.sampling)
        in_hand: AnswerInHand | None = None
        last: Chunk | None = None
        try:
            with closing(iter(handle)) as chunks:
                for last in chunks:
                    in_hand = in_hand or self.session.begin_answer({"model": self.model.name})
                    in_hand.write(last.text)
                    yield Token(last.text)
        finally:
            if in_hand is not None:
                self._finish(in_hand, last)
        yield from self._told(handle, fitted)

    def stop(self) -> None:
        """Have the answer in hand end where it is. From any thread; the generator then ends by itself."""
        if self._handle is not None:
            self._handle.cancel()

    def _finish(self, in_hand: AnswerInHand, last: Chunk | None) -> None:
        ended = last is not None and last.finish_reason == "stop"
        metadata: dict[str, Any] = {"model": self.model.name, "fingerprint": self.model.fingerprint}
        if last is not None and last.usage is not None and last.timings is not None:
            metadata |= {"usage": asdict(last.usage), "timings": asdict(last.timings)}
        in_hand.finish(metadata, complete=ended)

    def _told(self, handle: Handle, fitted: FittedMessages) -> Generator[Event]:
        """What the answer took, and what a person should know of it."""
        completion = handle.result()
        use = fitted.use.sent(completion.usage)
        if completion.finish_reason == "length":
            yield Notice(f"The answer was cut at {completion.usage.completion_tokens} tokens (--max-new-tokens).")
        yield ContextReport(use)
        yield UsageReport(completion.usage)
        value = {"answer": completion.text, "finish_reason": completion.finish_reason, "context": use.as_dict()}
        yield Result(
            {
                **value,
                "usage": asdict(completion.usage),
                "timings": asdict(completion.timings),
                "model": self.model.name,
                "session": self.session.id,
            }
        )
