"""Log probabilities of prompts through servers: those of the weights, from `calpaca serve` itself too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from calpaca.core.engine import Conversation, Engine, Request, Sampling, TokenLogprob
from calpaca.core.engines.remote.address import read_address
from calpaca.core.engines.remote.engine import RemoteEngine
from calpaca.core.errors import ContextOverflowError, ModelError, UnsupportedError

TEXT = "The llama carries wool and salt over the mountains."


def values(engine: Engine, ids: tuple[int, ...], alternatives: int = 2) -> list[tuple[float, list[float]]]:
    """Log probabilities of a prompt's tokens but the first, each with those of its alternatives."""
    request = Request(ids, Sampling(max_new_tokens=0), prompt_logprobs=alternatives)
    first, *others = engine.submit(request).result(60).prompt_logprobs
    assert first is None
    return [(entry.logprob, [value for *_, value in entry.top]) for entry in others if entry is not None]


def flat(scored: list[tuple[float, list[float]]]) -> list[float]:
    return [number for value, tops in scored for number in (value, *tops)]


def test_only_servers_that_give_them_are_asked_for_them(serving, connect, smollm2_engine: Engine) -> None:
    plain = connect(serving(smollm2_engine, "openai"))
    with pytest.raises(UnsupportedError, match="does not support prompt_logprobs"):
        plain.submit(Request("Hello", prompt_logprobs=0))
    knowing = connect(serving(smollm2_engine))
    conversation = Conversation(({"role": "user", "content": "Hello"},))
    with pytest.raises(UnsupportedError, match="prompt_logprobs of a conversation"):
        knowing.submit(Request("", conversation=conversation, prompt_logprobs=0))


def test_text_is_scored_as_the_tokens_that_the_server_makes_of_it(serving, connect, smollm2_engine: Engine) -> None:
    remote = connect(serving(smollm2_engine))
    answer = remote.submit(Request(TEXT, Sampling(max_new_tokens=0), prompt_logprobs=2)).result(60)
    ids = tuple(smollm2_engine.encode(TEXT))
    assert [entry.token_id for entry in answer.prompt_logprobs[1:] if entry is not None] == list(ids[1:])
    assert flat(values(remote, ids)) == pytest.approx(flat(values(smollm2_engine, ids)), abs=1e-3)


def test_a_prompt_that_fills_the_context_is_scored_and_a_longer_one_refused(
    serving, connect, smollm2_engine: Engine
) -> None:
    remote = connect(serving(smollm2_engine))
    length = smollm2_engine.capabilities().context_length
    assert length is not None
    with pytest.raises(ContextOverflowError):
        remote.submit(Request((5,) * (length + 1), Sampling(max_new_tokens=0), prompt_logprobs=0))
    remote.submit(Request((5,) * length, Sampling(max_new_tokens=0), prompt_logprobs=0)).cancel()


def test_scores_of_too_few_tokens_are_an_error(server, connect) -> None:
    few = {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None]}
    server.script.append(lambda handler: stream(handler, {"text": "a", "logprobs": few, "finish_reason": "length"}))
    asked = connect(server).submit(Request((5, 6, 7), Sampling(max_new_tokens=0), prompt_logprobs=0))
    with pytest.raises(ModelError, match="no piece of an answer"):
        asked.result(10)


def test_the_token_that_vllm_makes_beside_a_prompt_is_no_part_of_the_answer(server, connect) -> None:
    scores = {"tokens": ["a", "b"], "token_logprobs": [None, -0.5], "top_logprobs": [None, {"b": -0.5, "c": -0.1}]}
    choice = {"text": "", "logprobs": scores, "token_ids": [2], "finish_reason": "stop"}
    server.script.append(lambda handler: stream(handler, choice))
    request = Request((5, 6), Sampling(max_new_tokens=0), prompt_logprobs=1)
    answer = connect(server).submit(request).result(10)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", (), "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 0)
    assert answer.prompt_logprobs == (None, TokenLogprob(6, "b", -0.5, ((-1, "c", -0.1),)))


def stream(handler: Any, choice: dict[str, Any]) -> None:
    handler.start_stream()
    handler.event({"choices": [{"index": 0, **choice}]})
    handler.end_stream()


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, str]]]:
    """Addresses, each with a model: `calpaca serve` with real weights, and another one that asks the first."""
    if find_spec("calpaca_openai_api") is None:
        pytest.skip("calpaca-openai-api is not installed")
    started: list[subprocess.Popen[str]] = []
    found: list[tuple[str, str]] = []
    try:
        for _ in range(2):
            own = ["--model", str(smollm2), "--engine", "transformers", "--dtype", "float32", "--device", "cpu"]
            given = ["--model", "#".join(found[0])] if found else own
            process = subprocess.Popen(
                [sys.executable, "-m", "calpaca", "serve", "--port", "0", "--temperature", "0", *given],
                stderr=subprocess.PIPE, text=True, cwd=tmp_path_factory.mktemp("serve"), env=os.environ,
            )  # fmt: skip
            started.append(process)
            assert process.stderr is not None
            said = list[str]()
            while not said or not said[-1].startswith("Serving"):
                said.append(process.stderr.readline())
                assert said[-1], said
            address = said[-1].split()[-1]
            found.append((address, httpx.get(f"{address}/models").json()["data"][0]["id"]))
        yield found
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_calpaca_serve_scores_a_prompt_as_its_weights_do_also_behind_another_server(
    served: list[tuple[str, str]], smollm2_engine: Engine
) -> None:
    ids = tuple(smollm2_engine.encode(TEXT * 3))
    expected = flat(values(smollm2_engine, ids))
    asked = {"prompt": list(ids), "echo": True, "logprobs": 2, "max_tokens": 1}  # as lm-eval asks
    scored = []
    for address, model in served:
        remote = RemoteEngine([read_address(address)], model)
        assert remote.capabilities().prompt_logprobs
        assert flat(values(remote, ids)) == pytest.approx(expected, abs=1e-3)
        remote.close()
        answer = httpx.post(f"{address}/completions", json={"model": model, **asked}, timeout=60).json()
        scored.append(answer["choices"][0])
    direct, behind = scored
    assert behind["text"] == direct["text"]
    for name in ("tokens", "text_offset"):
        assert behind["logprobs"][name] == direct["logprobs"][name]
    assert behind["logprobs"]["token_logprobs"][1:] == pytest.approx(direct["logprobs"]["token_logprobs"][1:], abs=1e-3)
    for ours, theirs in zip(
        behind["logprobs"]["top_logprobs"][1:], direct["logprobs"]["top_logprobs"][1:], strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-3)
