"""One request that another process works on: what comes from there, as the chunks that its reader gets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from calpaca.core.detokenizer import Detokenizer, StopScanner, held_back
from calpaca.core.engine import Chunk, FinishReason, Handle, Request, Timings, Usage
from calpaca.core.tokenizer import Tokenizer


class Progress(NamedTuple):
    """What an engine's process reports: new tokens, or their text and number where it does not know the ids."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    tokens: int = 0
    finish: FinishReason | None = None
    cached: int = 0
    """Tokens of the prompt that were not computed again."""


class Answer:
    """The chunks of one answer. `take` and `fail` are for the reader of the process, `cancel` is for any thread.

    `release` is called when nothing more is wanted from the process.
    """

    def __init__(
        self,
        request: Request,
        prompt: list[int],
        *,
        max_new_tokens: int,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        release: Callable[[], None],
    ) -> None:
        self.handle = Handle(self.cancel)
        self._prompt_tokens = len(prompt)
        self._max_new_tokens = max_new_tokens
        self._eos_ids = eos_ids
        self._release = release
        self._detokenizer = Detokenizer(tokenizer, () if request.new_text else prompt)
        self._scanner = StopScanner(request.sampling.stop)
        self._lock = threading.RLock()
        self._pending: list[int] = []
        self._tokens = self._cached = 0
        self._submitted = time.perf_counter()
        self._first_token: float | None = None

    def take(self, progress: Progress) -> None:
        """Pass on what is new, and end the answer where it is complete."""
        with self._lock:
            if self.handle.done:
                return
            self._cached = max(self._cached, progress.cached)
            if self._first_token is None and (progress.token_ids or progress.tokens):
                self._first_token = time.perf_counter()
            text, finish = self._read(progress)
            if finish is not None:
                self._finish(finish, text)
                if progress.finish is None:
                    self._release()
            elif text:
                self.handle.put(Chunk(text, self._take_pending()))

    def _read(self, progress: Progress) -> tuple[str, FinishReason | None]:
        """The text that can be shown, and why the answer ends, if it does."""
        text = self._scanner.add(progress.text)
        self._tokens += progress.tokens
        for token_id in progress.token_ids:
            self._pending.append(token_id)
            self._tokens += 1
            if token_id in self._eos_ids:
                return text, "stop"
            text += self._scanner.add(self._detokenizer.add(token_id))
            if self._scanner.matched is not None:
                return text, "stop"
            if self._tokens >= self._max_new_tokens:
                return text, "length"
        return text, "stop" if self._scanner.matched is not None else progress.finish

    def fail(self, error: Exception) -> None:
        self.handle.fail(error)

    def cancel(self) -> None:
        """End the answer here and now; the process is told, and has a step more at most."""
        with self._lock:
            if not self.handle.done:
                self._finish("cancelled")
                self._release()

    def _finish(self, reason: FinishReason, text: str = "") -> None:
        """End the answer; what was held back is given out unless a stop text ended it."""
        text += held_back(self._detokenizer, self._scanner)
        if self._scanner.matched is not None and reason == "length":
            reason = "stop"
        now = time.perf_counter()
        self.handle.put(
            Chunk(
                text,
                self._take_pending(),
                finish_reason=reason,
                stop=self._scanner.matched,
                usage=Usage(self._prompt_tokens, self._tokens, self._cached),
                timings=Timings((self._first_token or now) - self._submitted, now - self._submitted),
            )
        )

    def _take_pending(self) -> tuple[int, ...]:
        taken, self._pending = tuple(self._pending), []
        return taken
