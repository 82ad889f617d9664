"""Fixtures that every test may use: a private place for data and settings, and the two default models.

Models lie in the ordinary cache, where `make setup` puts them; a test run without them fetches them first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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
