"""The openvino engine on real weights: the contract of every engine, and what only this one promises."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.engine import Grammar, Request, Sampling
from calpaca.core.engines.native import NativeEngine
from calpaca.core.engines.prepared import gguf_weights
from calpaca.core.errors import ModelError, UsageError
from calpaca.core.files import ModelFiles
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.testing import EngineContract

pytest.importorskip("openvino_genai", reason="pip install 'calpaca[openvino]'")


@pytest.fixture(scope="module")
def openvino_engine(smollm2: Path, smollm2_gguf: Path, sources_runtime: Runtime) -> Iterator[NativeEngine]:
    from calpaca.core.engines.openvino import NAME, READ_EXACTLY, start_engine

    files = ModelFiles(
        "smollm2", ModelSpec(model=str(smollm2_gguf), device="cpu", dtype="float32"), smollm2, (), smollm2, None
    )
    engine = start_engine(files, gguf_weights(files, sources_runtime, NAME, READ_EXACTLY), sources_runtime)
    yield engine
    engine.close()


class TestContract(EngineContract):
    @pytest.fixture
    def engine(self, openvino_engine: NativeEngine) -> NativeEngine:
        return openvino_engine


def answer(engine: NativeEngine, prompt: str, new_tokens: int = 12) -> str:
    return engine.submit(Request(prompt, Sampling(max_new_tokens=new_tokens))).result(60).text


def test_greedy_answers_are_those_of_transformers(openvino_engine: NativeEngine, smollm2: Path) -> None:
    from calpaca.core.engines.transformers import open_engine

    reference = open_engine(
        ModelFiles("smollm2", ModelSpec(device="cpu", dtype="float32"), smollm2, (), smollm2, None), Runtime(Settings())
    )
    for prompt in ("Once upon a time there was a llama", "The three primary colours are", "In 1969, the first"):
        request = Request(prompt, Sampling(max_new_tokens=24))
        assert openvino_engine.submit(request).result(60).text == reference.submit(request).result(60).text
    reference.close()


def test_a_crash_fails_what_runs_and_the_next_request_starts_anew(openvino_engine: NativeEngine) -> None:
    before = answer(openvino_engine, "The llama")
    handles = [openvino_engine.submit(Request("Once upon a time", Sampling(max_new_tokens=500))) for _ in range(3)]
    next(iter(handles[0]))
    assert openvino_engine.worker.pid is not None
    os.kill(openvino_engine.worker.pid, signal.SIGKILL)
    for handle in handles[1:]:
        with pytest.raises(ModelError, match=r"ended unexpectedly \(killed by SIGKILL\)"):
            handle.result(60)
    assert answer(openvino_engine, "The llama") == before


def test_cancelled_requests_leave_no_busy_slot(openvino_engine: NativeEngine) -> None:
    chance = random.Random(7)
    for number in range(200):
        prompt = f"{number}. Once upon a time " + "x " * chance.randrange(100)
        handle = openvino_engine.submit(Request(prompt, Sampling(max_new_tokens=300)))
        threading.Timer(chance.random() * 0.2, handle.cancel).start()
        time.sleep(chance.random() * 0.01)
    deadline = time.monotonic() + 60
    while openvino_engine.worker.running:
        assert time.monotonic() < deadline, f"{openvino_engine.worker.running} requests still run"
        time.sleep(0.01)
    assert answer(openvino_engine, "The llama") != ""


def test_a_prompt_that_was_seen_is_not_read_again(openvino_engine: NativeEngine) -> None:
    context = "The committee met again to discuss the matter at length. " * 60
    first, second = (
        openvino_engine.submit(Request(context + question, Sampling(max_new_tokens=1))).result(120)
        for question in ("Who met?", "What was said?")
    )
    assert second.timings.first_token < 0.3 * first.timings.first_token


def test_a_grammar_that_openvino_cannot_read_is_told_and_the_engine_goes_on(
    openvino_engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library does not survive it, so what is refused is decided before it sees a grammar; this is the last net."""
    alone = answer(openvino_engine, "The llama")
    with monkeypatch.context() as patch:
        patch.setattr(openvino_engine, "_translate", lambda grammar: ("regex", str(grammar.value)))
        good = openvino_engine.submit(Request("Hi", Sampling(max_new_tokens=8), Grammar("regex", "yes!")))
        assert good.result(60).text == "yes!"
        bad = openvino_engine.submit(Request("Hi", Sampling(max_new_tokens=8), Grammar("regex", "(unclosed")))
        with pytest.raises(UsageError, match="cannot use this grammar"):
            bad.result(60)
    assert answer(openvino_engine, "The llama") == alone


def test_json_is_valid_under_schemas_of_many_kinds(openvino_engine: NativeEngine) -> None:
    from jsonschema import validate

    tree = {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}]}
    schemas: list[dict[str, Any]] = [
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 120}, "b": {"type": "null"}}},
        {"type": "object", "additionalProperties": {"type": "integer", "minimum": -5, "maximum": 5}},
        {"type": "array", "items": {"enum": ["é", "你好\n", 1, None, {"q": [1, 2]}]}, "minItems": 2, "maxItems": 2},
        {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "minItems": 4, "maxItems": 5},
        {"type": ["string", "boolean"], "minLength": 3, "maxLength": 20},
        {"$ref": "#/$defs/tree", "$defs": {"tree": tree}},
    ]  # fmt: skip
    for schema in schemas:
        for sampling in (Sampling(60), Sampling(60, temperature=1.2, seed=4)):
            handle = openvino_engine.submit(Request("Some JSON: ", sampling, Grammar("json_schema", schema)))
            result = handle.result(60)
            if result.finish_reason == "stop":
                validate(json.loads(result.text), schema)
