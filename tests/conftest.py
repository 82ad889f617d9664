"""Fixtures that every test may use: a private place for data and settings, the default models, plugins made on the fly.

Models lie in the ordinary cache, where `make setup` puts them; a test run without them fetches them first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

# Before any library reads them: tests ask no model hub, and one thread per worker is fastest on few cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.sources import resolve_embedding, resolve_model


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs and settings of the person who runs the tests are neither read nor touched."""
    monkeypatch.setenv("CALPACA_DATA", str(tmp_path / "calpaca-data"))
    monkeypatch.setenv("CALPACA_CONFIG", str(tmp_path / "calpaca-config"))


@pytest.fixture(scope="session")
def sources_runtime() -> Iterator[Runtime]:
    """A runtime that knows calpaca's own sources and nothing else."""
    from calpaca.plugins import builtin

    with Runtime(Settings()) as runtime:
        for component in builtin.register_sources():
            runtime.sources.add(component, "builtin")
        yield runtime


@pytest.fixture(scope="session")
def smollm2(sources_runtime: Runtime) -> Path:
    """The Hugging Face folder of smollm2-135m-instruct."""
    import torch

    torch.set_num_threads(1)
    return resolve_model("smollm2-135m-instruct", sources_runtime, format="hf").path


@pytest.fixture(scope="session")
def smollm2_gguf(sources_runtime: Runtime) -> Path:
    """The GGUF file of smollm2-135m-instruct."""
    return resolve_model("smollm2-135m-instruct", sources_runtime, format="gguf").path


@pytest.fixture(scope="session")
def e5(sources_runtime: Runtime) -> Path:
    """The sentence-transformers folder of multilingual-e5-small."""
    import torch

    torch.set_num_threads(1)
    return resolve_embedding("multilingual-e5-small", sources_runtime).path


# Distributions made on the fly: a module and a `.dist-info` with an entry point, in a folder of their own -----------


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder on the import path, whose modules are forgotten again."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def make_plugin(site) -> Callable[..., None]:
    """`make_plugin(name, source, distribution=…, version=…)` installs a plugin."""

    def make(
        name: str, source: str, *, distribution: str | None = None, version: str = "1.0", module: str = ""
    ) -> None:
        distribution = distribution or f"calpaca-{name}"
        module = module or f"plugin_{distribution.replace('-', '_')}"
        (site / f"{module}.py").write_text(dedent(source), encoding="utf-8")
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[calpaca]\n{name} = {module}\n")

    return make


APP = """
from pydantic import BaseModel
from calpaca import App, hookimpl
from calpaca.core.events import Result, Token

class Options(BaseModel):
    text: str | None = None

class Runner:
    def stream(self, text):
        yield Token(text.upper())
        yield Result({{"answer": text.upper()}})

def build(options, runtime):
    return Runner()

@hookimpl
def register_apps():
    return [App("{app}", "Says it loudly.", __name__ + ":build", options=__name__ + ":Options", input="text")]
"""


@pytest.fixture
def app_source() -> Callable[[str], str]:
    """Source of a plugin with one working app of the given name."""
    return lambda app: APP.format(app=app)
