"""`calpaca chat` on real weights: line by line, and in a terminal."""

import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from calpaca.core.sessions import Sessions

MODEL = ("--plain", "--model", "smollm2-135m-instruct", "--dtype", "float32")
PARIS = "What is the capital of France?"


@pytest.fixture
def talk(calpaca, smollm2, tmp_path, monkeypatch):
    """`talk("line\\nline", "--session", "x")` holds a plain chat, with sessions of its own."""
    monkeypatch.setenv("CALPACA_DATA", str(tmp_path / "data"))
    return lambda lines, *arguments: calpaca("chat", *MODEL, "--max-new-tokens", "16", *arguments, stdin=lines)


@pytest.fixture
def sessions(tmp_path) -> Sessions:
    return Sessions(tmp_path / "data" / "sessions.sqlite")


def test_lines_are_answered_until_a_blank_one_and_kept(talk, sessions):
    result = talk(f"{PARIS}\n\nnever asked\n")
    assert (result.code, result.out) == (0, "The capital of France is Paris.\n")
    (record,) = sessions.records()
    assert (record.title, record.messages) == (PARIS, 2)
    assert record.setup["model"] == "smollm2-135m-instruct"


def test_a_session_is_gone_on_with_by_its_title(talk, sessions):
    talk(PARIS, "--session", "France", "--system", "You know geography.")
    again = talk("And of Italy?", "--session", "France", "--json")
    assert again.json["context"]["dropped"] == 0
    messages = sessions.find("France").messages()
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    refused = talk("x", "--session", "France", "--system", "Other.")
    assert (refused.code, "has begun already" in refused.err) == (2, True)


def test_a_title_of_two_sessions_is_no_third_one(talk, sessions):
    for _ in range(2):
        sessions.new({}, "twice").add("user", "hello")
    result = talk(PARIS, "--session", "twice")
    assert (result.code, "names 2 sessions" in result.err) == (1, True)
    assert len(sessions.records()) == 2


def test_with_single_turn_each_line_stands_alone(talk, sessions):
    first, second = talk(f"{PARIS}\n{PARIS}\n", "--single-turn").out.splitlines()
    assert first == second == "The capital of France is Paris."
    assert len(sessions.find(PARIS).path()) == 2


def test_a_line_that_cannot_be_answered_is_told_and_the_next_one_is_answered(talk):
    result = talk("long " * 9000 + f"\n{PARIS}\n", "--context", "error")
    assert result.code == 3
    assert "the context holds 8192" in result.err
    assert result.out == "The capital of France is Paris.\n"


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_the_answer_and_a_kill_loses_nothing_that_was_shown(smollm2, tmp_path):
    pid, terminal = _in_terminal(tmp_path, *MODEL, "--session", "long")
    _read_until(terminal, "> ")
    os.write(terminal, b"Write a very long story about a llama.\n")
    _read_until(terminal, "llama.\r\n", "the")
    os.write(terminal, b"\x03")
    _read_until(terminal, "[stopped; what there was of it is kept]", "> ")
    os.write(terminal, b"Write another one.\n")
    shown = _read_until(terminal, "one.\r\n", "the").partition("one.\r\n")[2]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    path = Sessions(tmp_path / "data" / "sessions.sqlite").find("long").path()
    assert [(message.role, message.complete) for message in path] == [
        ("user", True),
        ("assistant", False),
        ("user", True),
        ("assistant", False),
    ]
    assert path[-1].content.startswith(shown.replace("\r\n", "\n").rstrip())


def test_without_a_terminal_the_chat_says_how_to_talk(calpaca):
    result = calpaca("chat", "--model", "smollm2-135m-instruct", stdin=PARIS)
    assert (result.code, result.out) == (2, "")
    assert "Add --plain" in result.err


@pytest.mark.slow
def test_in_a_terminal_one_asks_stops_and_quits(smollm2, tmp_path):
    pid, terminal = _in_terminal(tmp_path, *MODEL[1:], "--session", "screen")
    _read_until(terminal, "Ask something")
    os.write(terminal, PARIS.encode() + b"\r")
    _read_until(terminal, "Paris")
    _read_until(terminal, "tokens/s")
    os.write(terminal, b"Write a very long story about a llama.\r")
    _read_until(terminal, "Writing")
    time.sleep(1)
    os.write(terminal, b"\x1b")
    _read_until(terminal, "complete")
    os.write(terminal, b"\x11")
    assert os.waitpid(pid, 0)[1] == 0
    path = Sessions(tmp_path / "data" / "sessions.sqlite").find("screen").path()
    assert [message.complete for message in path] == [True, True, True, False]


@pytest.mark.slow
def test_a_kill_in_mid_answer_loses_nothing_that_was_on_the_screen(smollm2, tmp_path):
    pid, terminal = _in_terminal(tmp_path, *MODEL[1:], "--session", "killed")
    _read_until(terminal, "Ask something")
    os.write(terminal, b"Write a very long story about a llama.\r")
    _read_until(terminal, "Writing", "Once")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    question, answer = Sessions(tmp_path / "data" / "sessions.sqlite").find("killed").path()
    assert (question.complete, answer.complete) == (True, False)
    assert answer.content.startswith("Once")


def _in_terminal(folder: Path, *arguments: str) -> tuple[int, int]:
    """A chat in a terminal of its own: process id, and the terminal's other side."""
    pid, terminal = pty.fork()
    if pid == 0:
        environment = {"CALPACA_DATA": str(folder / "data"), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
        try:
            command = [sys.executable, "-m", "calpaca", "chat", *arguments]
            os.execve(sys.executable, command, {**os.environ, **environment})
        finally:
            os._exit(1)  # the copy of the test process must not go on testing
    return pid, terminal


def _read_until(terminal: int, *texts: str) -> str:
    """What the program writes until it has written all of these, one after the other."""
    seen, until = "", time.monotonic() + 120
    at = 0
    for text in texts:
        while text not in seen[at:]:
            ready, _, _ = select.select([terminal], [], [], until - time.monotonic())
            assert ready, seen
            seen += os.read(terminal, 4096).decode(errors="replace")
        at = seen.index(text, at) + len(text)
    return seen
