"""Completions, embeddings, models, tokens and the state of the server, on a scripted engine."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from calpaca.testing import FakeEmbedder
from calpaca_openai_api.settings import KeySettings, digest


async def test_a_completion_has_the_published_shape(scripted, fits) -> None:
    answer = (await scripted().post("/v1/completions", prompt="A llama")).json()
    fits("CreateCompletionResponse", answer)
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"][0]["text"] == "The llama is a c"  # 16 tokens, as documented
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_choices_of_several_prompts_stand_in_their_order(scripted, fits) -> None:
    server = scripted(lambda prompt: f"after {prompt}")
    answer = (await server.post("/v1/completions", prompt=["one", "two"], n=2)).json()
    fits("CreateCompletionResponse", answer)
    texts = ["after one", "after one", "after two", "after two"]
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(texts))
    assert answer["usage"]["prompt_tokens"] == 6


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]], "ab", ["ab"]])
async def test_token_ids_and_texts_are_prompts(scripted, prompt) -> None:
    server = scripted()
    answer = (await server.post("/v1/completions", prompt=prompt, echo=True)).json()
    assert server.engine.prompts == ["ab"]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["choices"][0]["text"].startswith("abThe llama")


async def test_logprobs_are_four_equal_lists_whose_offsets_point_into_the_text(scripted, fits) -> None:
    answer = (await scripted("Olá, 世界!").post("/v1/completions", prompt="x", max_tokens=40, logprobs=2)).json()
    fits("CreateCompletionResponse", answer)
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    assert len({len(values) for values in found.values()}) == 1
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, offset, top in zip(found["tokens"], found["text_offset"], found["top_logprobs"], strict=True):
        if "\ufffd" not in token:
            assert choice["text"][offset:].startswith(token)
        assert token in top


async def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_asks_for_it(scripted) -> None:
    server = scripted(None)
    body = {"prompt": [list("Olá".encode()), [97, 98]], "echo": True, "logprobs": 1, "temperature": 0}
    for most in (1, 0):
        for choice in (await server.post("/v1/completions", max_tokens=most, **body)).json()["choices"]:
            found, prompt = choice["logprobs"], ("Olá", "ab")[choice["index"]]
            size = len(prompt.encode())
            assert choice["text"].startswith(prompt)
            assert [len(each) for each in found.values()] == [size + most] * 4
            assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
            assert all(value <= 0 for value in found["token_logprobs"][1:])
            assert found["text_offset"][:size] == ([0, 1, 2, 2] if size == 4 else [0, 1])
            assert found["text_offset"][size:] == [len(prompt)] * most
            assert all(1 <= len(top) <= 2 for top in found["top_logprobs"][1:])


async def test_a_prompt_that_is_echoed_with_logprobs_begins_a_stream(scripted) -> None:
    server = scripted(None)
    body = {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 3, "seed": 4, "n": 2}
    whole = (await server.post("/v1/completions", **body)).json()
    chunks = (await server.events("/v1/completions", **body))[:-1]
    for index, choice in enumerate(whole["choices"]):
        own = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        assert "".join(each["text"] for each in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for each in own for value in each["logprobs"][name]] == values


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_every_sampling_field_reaches_the_engine(scripted, path) -> None:
    server = scripted()
    fields = {"top_k": 3, "min_p": 0.2, "repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": -1}
    prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    response = await server.post(path, **prompt, **fields, logit_bias={"5": 100, "7": -1.5})
    assert response.status_code == 200, response.text
    sampling = server.engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == ((5, 100.0), (7, -1.5))


async def test_a_penalty_changes_a_long_text_and_an_empty_prompt_is_no_server_error(scripted) -> None:
    server = scripted(None)
    body = {"prompt": "abc", "max_tokens": 60, "temperature": 0, "logit_bias": {"261": -100}}
    plain, penalised = [
        (await server.post("/v1/completions", **body, **fields)).json()["choices"][0]["text"]
        for fields in ({}, {"frequency_penalty": 2.0, "presence_penalty": 2.0})
    ]
    assert len(plain) == len(penalised) == 60
    assert plain != penalised
    assert (await server.post("/v1/completions", prompt="", max_tokens=1)).status_code in (200, 400)


async def test_a_bias_forces_a_token_and_one_on_no_token_is_a_400(scripted) -> None:
    server = scripted(None)
    answer = (await server.post("/v1/completions", prompt="x", max_tokens=3, logit_bias={str(ord("q")): 100})).json()
    assert answer["choices"][0]["text"] == "qqq"
    assert (await server.post("/v1/completions", prompt="x", logit_bias={"99999": 1})).status_code == 400


async def test_no_tokens_are_an_empty_text(scripted) -> None:
    server = scripted()
    answer = (await server.post("/v1/completions", prompt="abc", max_tokens=0, echo=True)).json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["usage"]["completion_tokens"] == 0
    assert server.engine.requests == []


async def test_the_best_of_several_is_given_and_all_are_counted(scripted) -> None:
    server = scripted(None)
    single = (await server.post("/v1/completions", prompt="abc", max_tokens=4, seed=1)).json()
    best = (await server.post("/v1/completions", prompt="abc", max_tokens=4, seed=1, best_of=3)).json()
    assert len(best["choices"]) == 1
    assert best["usage"]["completion_tokens"] > single["usage"]["completion_tokens"]
    assert best["usage"]["prompt_tokens"] == single["usage"]["prompt_tokens"]
    assert best["choices"][0]["logprobs"] is None


async def test_a_streamed_completion_joins_to_the_whole_one(scripted, fits) -> None:
    server = scripted(lambda prompt: f"after {prompt} END")
    body = {"prompt": ["one", "two"], "stop": " END", "logprobs": 1, "max_tokens": 50}
    whole = (await server.post("/v1/completions", **body)).json()
    *chunks, last, done = await server.events("/v1/completions", **body, stream_options={"include_usage": True})
    assert (done, last["usage"]) == ("[DONE]", whole["usage"])
    for index, choice in enumerate(whole["choices"]):
        own = [each["choices"][0] for each in chunks if each["choices"][0]["index"] == index]
        assert "".join(each["text"] for each in own) == choice["text"] == f"after {body['prompt'][index]}"
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == ["stop"]
        offsets = [offset for each in own for offset in each["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]


async def test_embeddings_are_the_same_as_floats_and_as_base64(scripted, fits) -> None:
    server = scripted()
    floats = (await server.post("/v1/embeddings", input=["a llama", "a cat"])).json()
    fits("CreateEmbeddingResponse", floats)
    coded = (await server.post("/v1/embeddings", input=["a llama", "a cat"], encoding_format="base64")).json()
    for plain, packed in zip(floats["data"], coded["data"], strict=True):
        vector = np.frombuffer(base64.b64decode(packed["embedding"]), dtype="<f4")
        np.testing.assert_array_equal(vector, np.array(plain["embedding"], dtype=np.float32))
    assert [each["index"] for each in floats["data"]] == [0, 1]
    assert floats["usage"]["total_tokens"] == 4


async def test_what_an_embedding_model_cannot_do_is_refused(scripted) -> None:
    server = scripted(embedder=FakeEmbedder(64))
    refused = {
        "dimensions": {"input": "a", "dimensions": 32},
        "input": {"input": [1, 2]},
        "encoding_format": {"input": "a", "encoding_format": "int8"},
    }
    for field, body in refused.items():
        response = await server.post("/v1/embeddings", **body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    for empty in ([], "", [[]], ["a", ""]):
        assert (await server.post("/v1/embeddings", input=empty)).status_code == 400
    long = await server.post("/v1/embeddings", input="word " * 600)
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert (await server.post("/v1/embeddings", input="a", dimensions=64)).status_code == 200


async def test_models_are_listed_and_shown(scripted, fits) -> None:
    server = scripted()
    listed = (await server.client.get("/v1/models")).json()
    fits("ListModelsResponse", listed)
    assert [model["id"] for model in listed["data"]] == [
        "fake",
        "multilingual-e5-small",
        "app:retrieval_qa",
        "app:summarize",
    ]
    for model in listed["data"]:
        shown = (await server.client.get(f"/v1/models/{model['id']}")).json()
        fits("Model", shown)
        assert shown == model


async def test_texts_and_conversations_are_tokenised(scripted) -> None:
    server = scripted()
    tokens = (await server.post("/tokenize", prompt="ab")).json()
    assert tokens == {"count": 2, "max_model_len": 32768, "tokens": [97, 98]}
    assert (await server.post("/detokenize", tokens=[97, 98])).json() == {"prompt": "ab"}
    conversation = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = (await server.post("/v1/chat/completions", **conversation)).json()
    assert (await server.post("/tokenize", **conversation)).json()["count"] == answer["usage"]["prompt_tokens"]
    assert (await server.post("/tokenize")).status_code == 400


async def test_state_and_metrics_are_shown(scripted) -> None:
    server = scripted()
    assert (await server.client.get("/health")).json() == {"status": "ok"}
    assert (await server.client.get("/ready")).status_code == 200
    await server.chat()
    metrics = (await server.client.get("/metrics")).text
    assert 'calpaca_completion_tokens_total{key="",model="fake"} 23.0' in metrics
    assert "calpaca_requests_running 0.0" in metrics
    assert 'calpaca_time_to_first_token_seconds_count{model="fake"} 1.0' in metrics
    server.api.admission.draining = True
    assert (await server.client.get("/ready")).status_code == 503
    schema = (await server.client.get("/openapi.json")).json()
    assert "/v1/chat/completions" in schema["paths"]


# Keys, queue, log ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic c2VjcmV0", "Bearer", "secret"])
async def test_without_the_key_there_is_a_401(scripted, header) -> None:
    server = scripted(keys={"ann": KeySettings(sha256=digest("secret"))})
    headers = {"Authorization": header} if header else {}
    for path in ("/v1/models", "/metrics"):
        response = await server.client.get(path, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await server.client.get("/health", headers=headers)).status_code == 200
    assert (await server.client.get("/v1/models", headers={"Authorization": "Bearer secret"})).status_code == 200


async def test_a_key_may_be_for_some_models_only(scripted) -> None:
    keys = {"ann": KeySettings(sha256=digest("secret"), models=("multilingual-e5-small",))}
    server = scripted(keys=keys)
    server.client.headers["Authorization"] = "Bearer secret"
    response = await server.chat()
    assert (response.status_code, response.json()["error"]["param"]) == (403, "model")
    assert (await server.post("/v1/embeddings", input="a")).status_code == 200
    listed = (await server.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["multilingual-e5-small"]


async def test_a_full_queue_is_a_503_and_a_key_with_too_many_requests_gets_a_429(scripted, until) -> None:
    import asyncio

    keys = {
        "ann": KeySettings(sha256=digest("a"), concurrency=2),
        "bob": KeySettings(sha256=digest("b")),
    }
    server = scripted("one two three", keys=keys, engine={"delay": 0.2}, max_running=1, max_waiting=1)
    ann, bob = {"Authorization": "Bearer a"}, {"Authorization": "Bearer b"}
    body = {"messages": [{"role": "user", "content": "Hi"}]}

    async def ask(headers):
        return await server.client.post("/v1/chat/completions", json=body, headers=headers)

    first, second = asyncio.create_task(ask(ann)), asyncio.create_task(ask(ann))
    assert await until(lambda: server.api.admission.running == server.api.admission.waiting == 1)
    third, fourth = await ask(ann), await ask(bob)
    assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert fourth.status_code == 503
    for refused in (third, fourth):
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["x-should-retry"] == "true"
    assert [each.status_code for each in await asyncio.gather(first, second)] == [200, 200]
    assert server.engine.peak == 1


async def test_waiting_requests_of_two_keys_take_turns() -> None:
    import asyncio

    from calpaca_openai_api.admission import Admission

    admission = Admission(1, 10)
    order = []

    async def ask(key):
        async with admission.slot(key):
            order.append(key)
            await asyncio.sleep(0)

    async with admission.slot("x"):
        tasks = [asyncio.create_task(ask(key)) for key in ("a", "a", "a", "b", "b")]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["a", "b", "a", "b"]
    assert (admission.running, admission.waiting) == (0, 0)


async def test_only_this_machine_is_answered_where_no_key_is_asked_for(scripted) -> None:
    server = scripted()
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        response = await server.client.get("/v1/models", headers={"Host": host})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert (await server.client.get("/v1/models", headers={"Host": host})).status_code == 200


async def test_no_other_origin_is_let_in(scripted) -> None:
    response = await scripted().client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


async def test_the_log_has_one_line_a_request_and_no_text_of_it(scripted, caplog) -> None:
    import json

    caplog.set_level("INFO", logger="calpaca.access")
    server = scripted("a secret answer")
    response = await server.chat("a secret question")
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "calpaca.access"]
    assert line["request"] == response.headers["x-request-id"]
    assert (line["status"], line["model"], line["completion_tokens"]) == (200, "fake", 15)
    assert "secret" not in json.dumps(line)
