"""docs/retrieval_qa.md: its commands are real, run, and its citations stand where it says."""

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
PAGE = (ROOT / "docs" / "retrieval_qa.md").read_text(encoding="utf-8")
SESSIONS = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line.removeprefix("$ calpaca ") for text in SESSIONS for line in text.splitlines() if line.startswith("$ ")]
CHINESE = [command for command in COMMANDS if "handbook.zh.md" in command]
MADE_ELSEWHERE = [command for command in COMMANDS if "xquad" in command]
ENGLISH = [command for command in COMMANDS if command not in CHINESE + MADE_ELSEWHERE]


def test_the_page_has_sessions_in_both_languages() -> None:
    assert len(ENGLISH) >= 5
    assert len(CHINESE) >= 3


def test_every_command_of_the_page_parses() -> None:
    """Names and values of all options; nothing is run."""
    for command in COMMANDS:
        name, of_group, *arguments = shlex.split(command)
        group = program.get_command(click.Context(program), name)
        assert isinstance(group, click.Group)
        found = group.get_command(click.Context(group), of_group)
        assert found is not None
        found.make_context(of_group, arguments, resilient_parsing=False)


def test_quotations_of_the_page_stand_at_the_lines_it_names() -> None:
    cited = re.findall(
        r"^  \[\d+\] (handbook[.\w]*), lines? (\d+)(?:-(\d+))?\n((?:      .*\n)*)", "".join(SESSIONS), re.MULTILINE
    )
    assert len(cited) >= 4
    quoted = 0
    for name, first, last, quote in cited:
        lines = (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()
        place = "\n".join(lines[int(first) - 1 : int(last or first)])
        assert "\n".join(line.strip() for line in quote.splitlines()) in place
        quoted += bool(quote)
    assert quoted >= 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("handbook.md", "handbook.zh.md"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    rows = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "set.jsonl").write_text(rows[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wiring, "_shared", None)
    yield tmp_path
    wiring.runtime().close()


@pytest.mark.slow
def test_the_english_sessions_run(folder, monkeypatch, capsys, smollm2, e5, ms_marco) -> None:
    monkeypatch.setenv("CALPACA_MODEL", "smollm2-135m-instruct")
    for command in ENGLISH:
        assert main(shlex.split(command)) == 0, command
        assert capsys.readouterr().out.strip(), command


@pytest.mark.slow
def test_the_chinese_sessions_run(folder, monkeypatch, capsys, qwen_gguf, e5) -> None:
    (folder / "qwen.gguf").symlink_to(qwen_gguf)
    monkeypatch.setenv("CALPACA_MODEL", "qwen.gguf")
    for command in CHINESE:
        assert main(shlex.split(command)) == 0, command
        assert capsys.readouterr().out.strip(), command
