"""Printing what an app reports: the answer and its sources on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from calpaca.core.events import ContextReport, Event, Notice, Progress, Result, Source, Step, Token

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""What a terminal takes for commands, as a document, its name or an answer may hold them: they are left out."""


class AnswerPrinter:
    """Prints events as they come.

    The text of the last step is the answer and goes to `out`; that of earlier steps goes to `err` when it is a
    terminal or `verbose` is set. With `as_json` only the result's value goes to `out`, as one object, indented by
    `indent` or on one line.
    """

    def __init__(
        self,
        out: TextIO,
        err: TextIO,
        *,
        answer: str,
        as_json: bool = False,
        indent: int | None = 2,
        verbose: bool = False,
    ) -> None:
        self.out = out
        self.err = err
        self.answer = answer
        self.as_json = as_json
        self.indent = indent
        self.show_steps = verbose or err.isatty()
        self.verbose = verbose
        self._is_last_step = True
        self._answered = False
        self._drafted = False
        self._sources: list[Source] = []
        self._context: ContextReport | None = None
        self._late: list[str] = []
        self._bar: Any = None
        self._bar_key: tuple[str, str] | None = None

    def show(self, events: Iterable[Event]) -> None:
        """Print all events. Closes `events` when it is left early, so that the work stops."""
        try:
            for event in events:
                self._show(event)
        finally:
            self._end_bar()
            close = getattr(events, "close", None)
            if close is not None:
                close()

    def _show(self, event: Event) -> None:
        match event:
            case Progress():
                self._progress(event)
            case Step():
                self._step(event)
            case Token():
                self._token(event)
            case Source():
                self._sources.append(event)
            case Notice():
                self._notice(f"Note: {event.text}\n")
            case ContextReport():
                self._context = event
            case Result():
                self._result(event)

    def _step(self, step: Step) -> None:
        self._is_last_step = step.index == step.total
        if step.total != 1 and self.show_steps:
            position = f"{step.index} of {step.total}" if step.total else str(step.index)
            self._aside(("\n" if self._drafted else "") + f"[step {position}: {step.name}]\n")

    def _token(self, token: Token) -> None:
        self._end_bar()
        if not self._is_last_step:
            if self.show_steps:
                self._drafted = True
                self._write(self.err, token.text)
        elif not self.as_json:
            self._answered = self._answered or bool(token.text)
            self._write(self.out, token.text)

    def _notice(self, line: str) -> None:
        """Print a line at once, or below the answer where that has begun."""
        if self._answered:
            self._late.append(line)
        else:
            self._aside(line)

    def _result(self, result: Result) -> None:
        self._end_bar()
        self._print(result)
        self._aside("".join(self._late))
        if self._context is not None and (self._context.use.dropped or self.show_steps):
            self._aside(f"Context: {self._context.use.line()}.\n")

    def _print(self, result: Result) -> None:
        if self.as_json:
            self.out.write(json.dumps(result.value, ensure_ascii=False, indent=self.indent, default=str) + "\n")
            self.out.flush()
            return
        text = "" if self._answered else str(result.value.get(self.answer, ""))
        self._write(self.out, f"{text}\n")
        if self._sources:
            self._write(self.out, "\nSources\n" + "".join(self._source(*pair) for pair in enumerate(self._sources, 1)))

    def _source(self, number: int, source: Source) -> str:
        place = ", ".join(filter(None, (_near(source.source), source.place)))
        score = f"  ({source.score:.2f})" if source.score is not None else ""
        text = "".join(f"      {line}\n" for line in source.text.splitlines()) if self.verbose else ""
        return f"  [{number}] {place}{score}\n{text}"

    def _progress(self, progress: Progress) -> None:
        key = (progress.what, progress.unit)
        if key != self._bar_key:
            self._end_bar()
            self._bar_key = key
            self._bar = tqdm(
                total=progress.total, desc=progress.what or None, unit=f" {progress.unit}", file=self.err,
                disable=not self.err.isatty(), leave=False, dynamic_ncols=True,
            )  # fmt: skip
        self._bar.total = progress.total
        self._bar.update(progress.done - self._bar.n)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = self._bar_key = None

    def _aside(self, text: str) -> None:
        self._end_bar()
        self._write(self.err, text)

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        stream.write(text.translate(_CONTROLS))
        stream.flush()


def _near(path: str) -> str:
    """A path as it is called from the current folder, where it lies below it."""
    here = f"{Path.cwd()}{os.sep}"
    return path.removeprefix(here)
