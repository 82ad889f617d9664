"""Printing events: the answer and its sources on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest

from calpaca.cli.answer import AnswerPrinter
from calpaca.cli.table import table
from calpaca.core.context import ContextUse
from calpaca.core.engine import Usage
from calpaca.core.events import ContextReport, Event, Notice, Progress, Result, Source, Step, Token, UsageReport

REFINE: list[Event] = [
    Progress(1, 2, "chunk", "Embedding"),
    Progress(2, 2, "chunk", "Embedding"),
    Step("answer", 1, 2),
    Token("draft", 1),
    Step("refine", 2, 2),
    Token("final ", 2),
    Token("answer", 2),
    Source("a.md", "Line one.\nLine two.", start=3, end=4, score=0.5),
    Source("b.md", "Other.", page=2, start=7, end=7),
    UsageReport(Usage(1, 2)),
    Result({"answer": "final answer", "strategy": "refine"}),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(events, err=None, **options) -> tuple[str, str]:
    out, err = io.StringIO(), err or io.StringIO()
    AnswerPrinter(out, err, answer="answer", **options).show(iter(events))
    return out.getvalue(), err.getvalue()


def test_the_last_steps_text_and_the_sources_go_to_stdout() -> None:
    out, err = show(REFINE)
    assert out == "final answer\n\nSources\n  [1] a.md, lines 3-4  (0.50)\n  [2] b.md, page 2, line 7\n"
    assert err == ""


def test_a_source_below_the_current_folder_is_called_from_there(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    out, _ = show([Source(str(tmp_path / "a.md"), "x"), Result({"answer": "a"})])
    assert "  [1] a.md\n" in out
    out, _ = show([Source("/elsewhere/a.md", "x"), Result({"answer": "a"})])
    assert "  [1] /elsewhere/a.md\n" in out


def test_earlier_steps_are_shown_on_a_terminal_or_when_asked_for() -> None:
    _, err = show(REFINE, Terminal())
    assert "[step 1 of 2: answer]\ndraft\n[step 2 of 2: refine]\n" in err
    out, err = show(REFINE, verbose=True)
    assert err == "[step 1 of 2: answer]\ndraft\n[step 2 of 2: refine]\n"
    assert "      Line one.\n      Line two.\n" in out


def test_json_is_one_object_and_nothing_else() -> None:
    out, err = show(REFINE, as_json=True)
    assert json.loads(out) == {"answer": "final answer", "strategy": "refine"}
    assert err == ""


def test_an_answer_that_was_not_streamed_is_printed_from_the_result() -> None:
    assert show([Result({"answer": "Nothing relevant was found."})])[0] == "Nothing relevant was found.\n"
    assert show([Step("look", 1), Token("thinking", 1), Result({"answer": "done"})])[0] == "done\n"


def test_tokens_without_steps_are_the_answer_as_they_come() -> None:
    out = io.StringIO()
    printer = AnswerPrinter(out, io.StringIO(), answer="answer")
    seen = []

    def events() -> Iterator[Event]:
        yield Token("one ")
        seen.append(out.getvalue())
        yield Token("two")
        seen.append(out.getvalue())
        yield Result({"answer": "one two"})

    printer.show(events())
    assert seen == ["one ", "one two"]
    assert out.getvalue() == "one two\n"


def test_notices_go_to_stderr() -> None:
    assert show([Notice("Skipped x.bin."), Result({"answer": "a"})]) == ("a\n", "Note: Skipped x.bin.\n")


def test_progress_vanishes_when_stderr_is_no_terminal_and_leaves_no_trace_on_one() -> None:
    events = [Progress(1, 4, "chunk", "Embedding"), Progress(4, 4, "chunk", "Embedding"), Result({"answer": "a"})]
    assert show(events)[1] == ""
    drawn = show(events, Terminal())[1]
    assert "Embedding" in drawn
    assert drawn.rstrip(" ").endswith("\r")


def test_work_that_is_left_early_is_closed() -> None:
    closed = []

    def events() -> Iterator[Event]:
        try:
            yield Token("a")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    with pytest.raises(KeyboardInterrupt):
        show(events())
    assert closed == [True]


def test_a_printer_that_fails_closes_the_work() -> None:
    closed = []

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    def events() -> Iterator[Event]:
        try:
            yield Token("a")
            yield Token("b")
        finally:
            closed.append(True)

    with pytest.raises(BrokenPipeError):
        AnswerPrinter(Broken(), io.StringIO(), answer="answer").show(events())
    assert closed == [True]


def test_tables_align_chinese_text() -> None:
    assert table(("NAME", "X"), [("羊驼", "1"), ("ab", "2")]) == "NAME  X\n羊驼  1\nab    2"


def test_what_was_left_out_is_said_and_else_only_a_terminal_is_told() -> None:
    whole = ContextReport(ContextUse("error", 8192, 512, 700, 1, 700))
    cut = ContextReport(ContextUse("drop", 8192, 512, 700, 1, 700, dropped=2, dropped_tokens=90))
    answer = Result({"answer": "a"})
    assert show([cut, answer]) == (
        "a\n", "Context: 700 tokens sent; the context holds 8,192; 2 messages (90 tokens) left out.\n"
    )  # fmt: skip
    assert show([whole, answer])[1] == ""
    assert "nothing left out.\n" in show([whole, answer], Terminal())[1]


def test_a_notice_that_comes_with_the_answer_is_printed_below_it() -> None:
    screen = io.StringIO()
    events = [Notice("early"), Token("answer"), Notice("late"), Result({"answer": "answer"})]
    AnswerPrinter(screen, screen, answer="answer").show(iter(events))
    assert screen.getvalue() == "Note: early\nanswer\nNote: late\n"
