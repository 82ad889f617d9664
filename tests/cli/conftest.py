"""Running the program: in this process for most tests, in one of its own where signals, pipes or locales matter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from calpaca.pytest_plugin import Outcome


@pytest.fixture
def calpaca(calpaca_program) -> Callable[..., Outcome]:
    """`calpaca("run", "shout", stdin="…")` runs the program here, in a folder of its own with no settings."""
    return calpaca_program


@pytest.fixture
def start(site, tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """`start("run", "count")` starts the program in a process of its own, with the plugins made on the fly."""

    def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        variables = {**os.environ, "PYTHONPATH": str(site), **environment}
        return subprocess.Popen(
            [sys.executable, "-m", "calpaca", *arguments], cwd=tmp_path, env=variables, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return run


JOB = """
import time
from typing import Annotated
from pydantic import BaseModel
from calpaca import App, hookimpl
from calpaca.core.events import Progress, Result
from calpaca.core.jobs import step_key

class Options(BaseModel):
    steps: int = 3
    seconds: float = 0.0

class Counting:
    def __init__(self, options, runtime):
        self.options = options
        self.job = runtime.jobs.start("count", f"Count to {options.steps}", options.model_dump(mode="json"))
        self.id = self.job.id

    def work(self, positions):
        time.sleep(self.options.seconds)
        return {position: b"x" for position in positions}

    def events(self):
        with self.job:
            self.job.expect(self.options.steps)
            keys = [step_key("count", number=number) for number in range(self.options.steps)]
            for number, _ in enumerate(self.job.steps("count", keys, self.work), 1):
                yield Progress(number, self.options.steps, "step", "Counting")
        yield Result({"answer": f"counted to {self.options.steps}", "reused": self.job.reused})

    def cancel(self):
        self.job.cancel()

@hookimpl
def register_apps():
    return [App("count", "Counts.", __name__ + ":Counting", options=__name__ + ":Options", kind="job", effects="write")]
"""


@pytest.fixture
def counting(make_plugin) -> None:
    """Installs the job app `count`."""
    make_plugin("counting", JOB)


@pytest.fixture
def shouting(make_plugin, app_source) -> None:
    """Installs the answer app `shout`, which repeats its text in capitals."""
    make_plugin("shouting", app_source("shout"))


@pytest.fixture
def project_file(tmp_path) -> Path:
    """`calpaca.toml` of the folder that the program runs in."""
    return tmp_path / "calpaca.toml"
