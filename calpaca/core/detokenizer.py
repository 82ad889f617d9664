"""Text from tokens as they arrive: whole characters only, and nothing that might be part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_CONTEXT = 6  # tokens of the prompt's end that decide how the first new token is spaced


class Decoder(Protocol):
    """What turns ids into text: a tokenizer, or an engine."""

    def decode(self, token_ids: list[int], /) -> str: ...


class Detokenizer:
    """Turns token ids into text incrementally.

    A token may hold part of a character (Chinese, emoji): its text is given once the character is whole. The text of
    all calls together is `decode(prompt + tokens)` without `decode(prompt)`; a text of its own has no prompt.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._prefix = 0  # where the text that is decoded anew begins
        self._read = len(self._ids)  # up to where it was given out

    def add(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        return self._next(final=False)

    def finish(self) -> str:
        """What is left; an unfinished character becomes U+FFFD."""
        return self._next(final=True)

    def _next(self, *, final: bool) -> str:
        given = self._tokenizer.decode(self._ids[self._prefix : self._read])
        text = self._tokenizer.decode(self._ids[self._prefix :])
        if len(text) <= len(given) or (text.endswith("\ufffd") and not final):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return text[len(given) :]


class StopScanner:
    """Passes text on until one of the stop texts occurs; what might begin one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """The text that can be shown. After a match it ends before the stop text and `matched` is set."""
        if not self._stops:
            return text
        self._held += text
        found = [(self._held.find(stop), -len(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            position, _, self.matched = min(found)
            shown, self._held = self._held[:position], ""
            return shown
        keep = self._possible_beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back and turned out to be no stop text."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = max(len(stop) for stop in self._stops) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if self._held.endswith(tuple(stop[:size] for stop in self._stops if len(stop) > size)):
                return size
        return 0


def held_back(detokenizer: Detokenizer, scanner: StopScanner) -> str:
    """The end of an answer's text: an unfinished character, and what was no stop text after all. Empty after a match,
    also one that the last character completes."""
    text = "" if scanner.matched is not None else scanner.add(detokenizer.finish())
    return text if scanner.matched is not None else text + scanner.finish()
