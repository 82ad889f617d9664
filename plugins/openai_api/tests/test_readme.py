"""The examples of the README run against a server as they stand."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from calpaca_openai_api.settings import read_serve_options

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the examples close no client
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("code", blocks("python"), ids=["openai", "langchain"])
def test_the_python_examples_answer(running, code):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.replace("http://127.0.0.1:8000", running.url), {})
    assert "llama" in out.getvalue().lower()


def test_the_curl_example_answers(running):
    (command,) = blocks("sh")
    result = subprocess.run(
        ["sh", "-c", command.replace("http://127.0.0.1:8000", running.url)], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["choices"][0]["message"]["content"]


def test_the_settings_examples_are_settings():
    apps, keys = map(tomllib.loads, blocks("toml"))
    assert apps["apps"]["handbook"]["app"] == "retrieval_qa"
    read_serve_options({}, keys["plugins"]["openai_api"])


def test_every_option_that_the_readme_names_exists():
    from calpaca_openai_api.command import serve

    flags = {flag for parameter in serve.params for flag in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= flags
