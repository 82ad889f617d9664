"""A question of a session that an app answers: what it says is kept as it comes, with what it rests on."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict
from typing import Any

from calpaca.core.events import Event, Result, Source, Step, Token
from calpaca.core.sessions import AnswerInHand, Session
from calpaca.plugins.app_run import RunningApp

_KEPT = ("citations", "model", "usage", "timings")
"""Keys of an app's result that are kept beside its answer."""


class AppTurn:
    """One answer. `start` begins the run; `answer` is the key of the result that holds the text."""

    def __init__(self, session: Session, name: str, answer: str, start: Callable[[], RunningApp]) -> None:
        self.session = session
        self._name = name
        self._key = answer
        self._start = start
        self._running: RunningApp | None = None
        self._in_hand: AnswerInHand | None = None
        self._sources: list[Source] = []
        self._result: Mapping[str, Any] | None = None
        self._is_last_step = True

    def answer(self) -> Generator[Event]:
        """What the app reports. Tokens are those of the answer alone; what is written of it stays when it is stopped."""
        self._running = self._start()
        try:
            for event in self._running:
                yield from self._noted(event)
        finally:
            self._finish()

    def stop(self) -> None:
        """Have the app end where it is. From any thread."""
        if self._running is not None:
            self._running.cancel()

    def _noted(self, event: Event) -> Generator[Event]:
        match event:
            case Step():
                self._is_last_step = event.index == event.total
            case Token(text=text):
                if not self._is_last_step or not text:
                    return
                self._written().write(text)
            case Source():
                self._sources.append(event)
            case Result(value=value):
                yield from self._settled(value)
        yield event

    def _settled(self, value: Mapping[str, Any]) -> Generator[Event]:
        """The result's text is the answer: it is shown where no token was, and kept where it says something else."""
        self._result = value
        text = _text(value, self._key)
        if self._in_hand is None:
            self._written().write(text)
            yield Token(text)
        elif text != self._in_hand.text:
            self._in_hand.rewrite(text)

    def _written(self) -> AnswerInHand:
        if self._in_hand is None:
            self._in_hand = self.session.begin_answer({"app": self._name})
        return self._in_hand

    def _finish(self) -> None:
        if self._in_hand is None:
            return
        value = self._result or {}
        kept = {name: value[name] for name in _KEPT if name in value}
        sources = [asdict(source) for source in self._sources]
        metadata = json.loads(json.dumps({"app": self._name, **kept, "sources": sources}, default=str))
        self._in_hand.finish(metadata, complete=self._result is not None)


def _text(value: Mapping[str, Any], key: str) -> str:
    """The answer of a result; of a job without one, all that it says."""
    if key in value:
        return str(value[key])
    return f"```json\n{json.dumps(dict(value), ensure_ascii=False, indent=2, default=str)}\n```"
