"""docs/summarize.md: its commands are real, and run."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from calpaca.cli.main import main, program
from calpaca.plugins import wiring

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "summarize.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ calpaca (.*)$", PAGE, re.MULTILINE)
CHINESE = [command for command in COMMANDS if "handbook.zh.md" in command]
ENGLISH = [command for command in COMMANDS if command not in CHINESE]


def test_every_command_of_the_page_parses() -> None:
    """Names and values of all options; nothing is run."""
    run = program.get_command(click.Context(program), "run")
    assert isinstance(run, click.Group)
    assert len(ENGLISH) >= 3 and len(CHINESE) >= 3
    for command in COMMANDS:
        name, app, *arguments = shlex.split(command)
        assert name == "run"
        found = run.get_command(click.Context(run), app)
        assert found is not None
        found.make_context(app, arguments, resilient_parsing=False)


def test_sizes_of_the_page_are_those_of_the_code() -> None:
    from calpaca_summarize.plan import CHUNK_SIZE, MOST_ARITY, NOTE_TOKENS
    from calpaca_summarize.summarizer import REPETITION_PENALTY

    said = (f"({CHUNK_SIZE:,}, or", f"at most {MOST_ARITY} summaries", f"at most {NOTE_TOKENS} tokens")
    for text in (*said, f"`--repetition-penalty` is {REPETITION_PENALTY} here"):
        assert text in PAGE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("handbook.md", "handbook.zh.md"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wiring, "_shared", None)
    yield tmp_path
    wiring.runtime().close()


def run_all(commands: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands:
        assert main(shlex.split(command)) == 0, command
        shown = capsys.readouterr()
        assert shown.out.strip(), command
        assert "Note: Coverage 1.0: " in shown.err, command


@pytest.mark.slow
def test_the_english_sessions_run(folder, monkeypatch, capsys, smollm2) -> None:
    monkeypatch.setenv("CALPACA_MODEL", "smollm2-135m-instruct")
    run_all(ENGLISH, capsys)


@pytest.mark.slow
def test_the_chinese_sessions_run(folder, monkeypatch, capsys, qwen_gguf) -> None:
    (folder / "qwen.gguf").symlink_to(qwen_gguf)
    monkeypatch.setenv("CALPACA_MODEL", "qwen.gguf")
    run_all(CHINESE, capsys)
