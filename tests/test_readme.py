"""What the README shows is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from calpaca.core.settings import Settings
from calpaca.plugins.wiring import build_runtime

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_plugin_of_the_readme_works(make_plugin) -> None:
    source = next(block for block in BLOCKS if "register_apps" in block)
    make_plugin("shout", source, module="shout")
    with build_runtime(Settings()) as runtime:
        app = runtime.apps.get("shout")
        runner = app.build(app.load_options()(text="hello"), runtime)
        assert list(runner.stream("hello"))[-1].value == {"answer": "HELLO"}


@pytest.mark.slow
def test_the_langchain_program_of_the_readme_runs(smollm2: Path) -> None:
    source = next(block for block in BLOCKS if "ChatCalpaca" in block)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make ([a-z-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
