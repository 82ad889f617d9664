"""Fixtures for authors of plugins, which pytest finds by itself. Nothing heavy is imported until one is used.

`calpaca_home` keeps jobs, settings and sessions of a test apart from a person's; `calpaca_program` runs the command line
in this process; `calpaca_runtime` makes a runtime whose model answers from a script; `calpaca_load` reads a file with the
loader that knows it.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from langchain_core.documents import Document

    from calpaca.plugins.testing import FakeRuntime


@dataclass(frozen=True)
class Outcome:
    """How the program ended: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What stdout holds, read as JSON."""
        return json.loads(self.out)


@pytest.fixture
def calpaca_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what calpaca writes; no settings, and no variable that chooses plugins or a model. Gives the folder."""
    for name in ("CALPACA_PLUGINS", "CALPACA_STRICT_PLUGINS", "CALPACA_DEBUG", "CALPACA_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CALPACA_DATA", str(tmp_path / "calpaca-data"))
    monkeypatch.setenv("CALPACA_CONFIG", str(tmp_path / "calpaca-config"))
    return tmp_path


@pytest.fixture
def calpaca_program(
    calpaca_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """`calpaca_program("run", "haiku", stdin="…", runtime=…)` runs the program here, in a folder of its own.

    With a `runtime`, such as that of `calpaca_runtime`, it answers without weights.
    """
    from calpaca.cli.main import main
    from calpaca.plugins import wiring

    monkeypatch.chdir(calpaca_home)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, stdin: str = "", runtime: Any = None) -> Outcome:
        monkeypatch.setattr(wiring, "_shared", runtime)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        capsys.readouterr()
        code = main(arguments)
        if wiring._shared is not None and runtime is None:
            wiring._shared.close()  # the threads of a model that is left open keep it in memory
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def calpaca_runtime(calpaca_home: Path) -> Callable[..., FakeRuntime]:  # noqa: ARG001  # for its effect
    """`calpaca_runtime(answers, **options)`: `calpaca.testing.fake_runtime` with settings of its own."""
    from calpaca.plugins.testing import fake_runtime

    return fake_runtime


@pytest.fixture
def calpaca_load(calpaca_home: Path) -> Callable[[str, bytes], list[Document]]:
    """`calpaca_load("film.srt", data)` writes a file and reads it with the loader that knows its ending."""
    from calpaca.core.settings import read_settings
    from calpaca.documents.loaders import load_file
    from calpaca.plugins.wiring import build_runtime

    def load(name: str, data: bytes) -> list[Document]:
        file = calpaca_home / name
        file.write_bytes(data)
        with build_runtime(read_settings()) as runtime:
            return load_file(file, runtime.loaders)

    return load
