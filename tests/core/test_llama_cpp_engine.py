"""The llama_cpp engine on real weights: the contract of every engine, and what only this one promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from calpaca.core.engines.native import NativeEngine
from calpaca.core.engines.prepared import gguf_weights
from calpaca.core.files import ModelFiles
from calpaca.core.runtime import Runtime
from calpaca.core.spec import ModelSpec
from calpaca.testing import EngineContract

pytest.importorskip("xllamacpp", reason="pip install 'calpaca[llama-cpp]'")


@pytest.fixture(scope="module")
def llama_cpp_engine(smollm2: Path, smollm2_gguf: Path, sources_runtime: Runtime) -> Iterator[NativeEngine]:
    from calpaca.core.engines.llama_cpp import EXACT, NAME, start_engine

    files = ModelFiles(
        "smollm2", ModelSpec(model=str(smollm2_gguf), device="cpu", dtype="float32"), smollm2, (), smollm2, None
    )
    engine = start_engine(files, gguf_weights(files, sources_runtime, NAME, EXACT), slots=4)
    yield engine
    engine.close()


class TestContract(EngineContract):
    @pytest.fixture
    def engine(self, llama_cpp_engine: NativeEngine) -> NativeEngine:
        return llama_cpp_engine
