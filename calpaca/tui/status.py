"""One line under the conversation: what the model does, how full the context is, how fast the last answer was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from textual.reactive import reactive
from textual.widgets import Static

from calpaca.core.context import ContextUse
from calpaca.core.events import Progress, Step


class StatusLine(Static):
    """`use` is the context of the last answer, `memory` the bytes that the model's process holds."""

    use: reactive[ContextUse | None] = reactive(None)
    memory: reactive[int | None] = reactive(None)

    def __init__(self) -> None:
        super().__init__(id="status", markup=False)
        self._doing = ""
        self._speed = ""

    def load(self) -> None:
        self._say("Loading the model; you can write already.")

    def waiting(self, *, loaded: bool) -> None:
        self._say("Reading …" if loaded else "Waiting for the model. Escape gives up.")

    def writing(self) -> None:
        self._say("Writing … Escape stops.")

    def working(self, event: Step | Progress) -> None:
        """What an app is at."""
        if isinstance(event, Progress):
            of = f" of {event.total:,}" if event.total is not None else ""
            self._say(f"{event.what or event.unit}: {event.done:,}{of} {event.unit} … Escape stops.")
        else:
            of = f" of {event.total}" if event.total else ""
            self._say(f"Step {event.index}{of}: {event.name} … Escape stops.")

    def ready(self) -> None:
        self._say("")

    def failed(self) -> None:
        self._say("The last attempt failed.")

    def answered(self, value: Mapping[str, Any]) -> None:
        """Speed from a result's usage and timings, where it has them: tokens/s after the first token, and seconds up to
        that. An app may count neither.
        """
        tokens = (value.get("usage") or {}).get("completion_tokens")
        timings = value.get("timings") or {}
        if tokens is None or "first_token" not in timings or "total" not in timings:
            self._speed = ""
            return
        after_first = timings["total"] - timings["first_token"]
        rate = f"{(tokens - 1) / after_first:.1f} tokens/s · " if tokens > 1 and after_first > 0 else ""
        self._speed = f"{tokens} tokens · {rate}first after {timings['first_token']:.1f} s"

    def watch_use(self) -> None:
        self._write()

    def watch_memory(self) -> None:
        self._write()

    def _say(self, doing: str) -> None:
        if doing != self._doing:
            self._doing = doing
            self._write()

    def _write(self) -> None:
        parts = [self._doing] if self._doing else [self._speed]
        self.update("  ·  ".join(part for part in (*parts, self._context_text(), self._memory_text()) if part))

    def _memory_text(self) -> str:
        return f"{self.memory / 1e9:.1f} GB" if self.memory is not None else ""

    def _context_text(self) -> str:
        """How full the context was, with what was left out."""
        use = self.use
        if use is None:
            return ""
        of = f" of {use.context_length:,}" if use.context_length else ""
        share = f" ({100 * use.sent_tokens / use.context_length:.0f} %)" if use.context_length else ""
        left_out = f", {use.dropped} messages left out" if use.dropped and use.summary is None else ""
        summed_up = f", {use.dropped} messages summed up" if use.dropped and use.summary is not None else ""
        return f"context {use.sent_tokens:,}{of} tokens{share}, {use.policy}{left_out}{summed_up}"
