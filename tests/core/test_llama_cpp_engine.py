"""The llama_cpp engine on real weights: the contract of every engine, and what only this one promises."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from calpaca.core.engine import Request, Sampling
from calpaca.core.engines.native import NativeEngine
from calpaca.core.engines.prepared import gguf_weights
from calpaca.core.errors import ModelError
from calpaca.core.files import ModelFiles
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.testing import EngineContract

pytest.importorskip("xllamacpp", reason="pip install 'calpaca[llama-cpp]'")


@pytest.fixture(scope="module")
def llama_cpp_engine(smollm2: Path, smollm2_gguf: Path, sources_runtime: Runtime) -> Iterator[NativeEngine]:
    from calpaca.core.engines.llama_cpp import NAME, TYPES, start_engine

    files = ModelFiles(
        "smollm2", ModelSpec(model=str(smollm2_gguf), device="cpu", dtype="float32"), smollm2, (), smollm2, None
    )
    weights = gguf_weights(files, sources_runtime, NAME, TYPES["float32"])
    engine = start_engine(files, weights, sources_runtime, slots=4)
    yield engine
    engine.close()


class TestContract(EngineContract):
    @pytest.fixture
    def engine(self, llama_cpp_engine: NativeEngine) -> NativeEngine:
        return llama_cpp_engine


def answer(engine: NativeEngine, prompt: str, new_tokens: int = 12) -> str:
    return engine.submit(Request(prompt, Sampling(max_new_tokens=new_tokens))).result(60).text


def test_greedy_answers_are_those_of_transformers(llama_cpp_engine: NativeEngine, smollm2: Path) -> None:
    from calpaca.core.engines.transformers import open_engine

    reference = open_engine(
        ModelFiles("smollm2", ModelSpec(device="cpu", dtype="float32"), smollm2, (), smollm2, None), Runtime(Settings())
    )
    for prompt in ("Once upon a time there was a llama", "The three primary colours are", "In 1969, the first"):
        request = Request(prompt, Sampling(max_new_tokens=24))
        assert llama_cpp_engine.submit(request).result(60).text == reference.submit(request).result(60).text
    reference.close()


def test_a_crash_fails_what_runs_and_the_next_request_starts_anew(llama_cpp_engine: NativeEngine) -> None:
    before = answer(llama_cpp_engine, "The llama")
    handles = [llama_cpp_engine.submit(Request("Once upon a time", Sampling(max_new_tokens=500))) for _ in range(3)]
    next(iter(handles[0]))
    assert llama_cpp_engine.worker.pid is not None
    os.kill(llama_cpp_engine.worker.pid, signal.SIGKILL)
    for handle in handles[1:]:
        with pytest.raises(ModelError, match=r"ended unexpectedly \(killed by SIGKILL\)"):
            handle.result(60)
    assert answer(llama_cpp_engine, "The llama") == before


def test_cancelled_requests_leave_no_busy_slot(llama_cpp_engine: NativeEngine) -> None:
    chance = random.Random(7)
    for number in range(200):
        prompt = f"{number}. Once upon a time " + "x " * chance.randrange(100)
        handle = llama_cpp_engine.submit(Request(prompt, Sampling(max_new_tokens=300)))
        threading.Timer(chance.random() * 0.2, handle.cancel).start()
        time.sleep(chance.random() * 0.01)
    deadline = time.monotonic() + 60
    while llama_cpp_engine.worker.running:
        assert time.monotonic() < deadline, f"{llama_cpp_engine.worker.running} requests still run"
        time.sleep(0.01)
    assert answer(llama_cpp_engine, "The llama") != ""


def test_a_prompt_that_was_seen_is_not_read_again(llama_cpp_engine: NativeEngine) -> None:
    context = "The committee met again to discuss the matter at length. " * 60
    first, second = (
        llama_cpp_engine.submit(Request(context + question, Sampling(max_new_tokens=1))).result(120)
        for question in ("Who met?", "What was said?")
    )
    assert second.timings.first_token < 0.3 * first.timings.first_token
