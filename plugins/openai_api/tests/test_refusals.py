"""Requests that are refused: always OpenAI's error object, with the right status, naming the field."""

from __future__ import annotations

import json

import pytest

from calpaca.core.errors import ModelError

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
UNCOMPILABLE = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)y("}}}


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


CHAT = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}]},
     "messages.0.tool_calls"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": 100_000}, "n"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [f"stop {n}" for n in range(10_000)]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"seed": 2**64}, "seed"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
    ({"presence_penalty": -2.5}, "presence_penalty"),
    ({"min_p": 1.1}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
     "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]}}}, "tool_choice"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"options": {"k": 1}}, "options"),
    ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
    ({"teperature": 1}, "teperature"),
    ({"num_beams": 4}, "num_beams"),
    ({"guidance_scale": 1.5}, "guidance_scale"),
    ({"draft_model": "small"}, "draft_model"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), CHAT, ids=[json.dumps(fields)[:60] for fields, _ in CHAT])
async def test_a_wrong_chat_request_is_a_400_that_names_the_field(scripted, fields, param) -> None:
    server = scripted()
    error = error_of(await server.post("/v1/chat/completions", **{"messages": USER, **fields}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert server.engine.requests == []
    assert server.api.admission.running == 0


async def test_methods_that_no_engine_offers_are_named_with_what_comes_nearest(scripted) -> None:
    server = scripted()
    error = error_of(await server.chat(num_beams=4), 400)
    assert error["code"] == "unsupported_parameter"
    assert "beam search" in error["message"]
    assert "temperature 0" in error["message"]
    error = error_of(await server.post("/v1/completions", prompt="a", negative_prompt="b"), 400)
    assert error["param"] == "negative_prompt"
    switched_off = {"num_beams": 1, "guidance_scale": 1.0, "draft_model": None}
    assert (await server.chat(**switched_off)).status_code == 200


COMPLETION = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [-1, 2]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a"] * 200}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 3, "stream": True}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETION, ids=[json.dumps(fields)[:60] for fields, _ in COMPLETION])
async def test_a_wrong_completion_request_is_a_400_that_names_the_field(scripted, fields, param) -> None:
    error = error_of(await scripted().post("/v1/completions", **{"prompt": "a", **fields}), 400)
    assert error["param"] == param


async def test_an_unknown_model_is_a_404(scripted, fits) -> None:
    server = scripted()
    for response in (
        await server.chat(model="gpt-9"),
        await server.post("/v1/completions", model="gpt-9", prompt="a"),
        await server.post("/v1/embeddings", model="gpt-9", input="a"),
        await server.client.get("/v1/models/gpt-9"),
    ):
        assert error_of(response, 404)["code"] == "model_not_found"
        fits("ErrorResponse", response.json())


async def test_models_are_asked_only_for_what_they_do(scripted) -> None:
    server = scripted()
    assert error_of(await server.chat(model="multilingual-e5-small"), 400)["param"] == "model"
    assert error_of(await server.post("/v1/embeddings", model="fake", input="a"), 400)["param"] == "model"
    assert error_of(await server.post("/v1/completions", model="app:retrieval_qa", prompt="a"), 400)["param"] == "model"


async def test_unknown_routes_and_wrong_methods_have_error_objects(scripted) -> None:
    server = scripted()
    error_of(await server.client.get("/v1/nothing"), 404)
    error_of(await server.post("/v1/nothing"), 404)
    error_of(await server.client.get("/v1/chat/completions"), 405)
    error_of(await server.client.delete("/v1/completions"), 405)


BODIES = {
    "malformed": b'{"messages": [',
    "empty": b"",
    "an array": b"[]",
    "a text": b'"hello"',
    "null": b"null",
    "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "a lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "a lone surrogate in a part": b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud800"}]}]}',
    "a lone surrogate as the model": b'{"model": "\\ud800", "messages": []}',
    "deep arrays": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not a number": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "infinity": b'{"messages": [{"role": "user", "content": "a"}], "temperature": Infinity}',
    "a number too long": b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_a_body_that_cannot_be_read_is_a_400(scripted, body) -> None:
    server = scripted()
    headers = {"Content-Type": "application/json"}
    error_of(await server.client.post("/v1/chat/completions", content=body, headers=headers), 400)
    assert (await server.chat()).status_code == 200


async def test_a_deep_schema_is_a_400(scripted) -> None:
    schema: dict = {"type": "string"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = await scripted().chat(response_format=wanted)
    assert response.status_code in (200, 400)
    wanted["json_schema"]["schema"] = UNCOMPILABLE
    error_of(await scripted().chat(response_format=wanted), 400)


async def test_anything_but_json_is_a_415(scripted) -> None:
    response = await scripted().client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    error_of(response, 415)


async def test_a_body_that_is_too_long_is_a_413_and_the_server_goes_on(scripted) -> None:
    server = scripted(max_body=4096)
    error_of(await server.chat("a" * 5000), 413)
    assert (await server.chat()).status_code == 200


async def test_a_context_that_overflows_is_told_with_numbers(scripted) -> None:
    server = scripted(engine={"context_length": 100})
    error = error_of(await server.chat("a" * 200), 400)
    assert error["code"] == "context_length_exceeded"
    assert "100 tokens" in error["message"]
    error = error_of(await server.chat("a" * 10, max_tokens=90, stream=True), 400)
    assert error["code"] == "context_length_exceeded"


async def test_an_error_before_the_first_piece_is_a_status_and_one_later_is_the_streams_last_event(scripted) -> None:
    broken = ModelError("The engine has crashed.")
    assert error_of(await scripted([broken]).chat(), 500)["message"] == "The engine has crashed."
    assert error_of(await scripted([broken]).chat(stream=True), 500)["type"] == "server_error"
    server = scripted([RuntimeError("secret detail")])
    response = await server.chat()
    assert "secret" not in error_of(response, 500)["message"]


async def test_an_error_in_a_running_stream_is_an_event(scripted, monkeypatch) -> None:
    server = scripted("one two three")
    chunks = server.engine._chunks

    def failing(work):
        yield next(chunks(work))
        raise ModelError("The engine has crashed.")

    monkeypatch.setattr(server.engine, "_chunks", failing)
    *_, error, done = await server.events("/v1/chat/completions", messages=USER)
    assert done == "[DONE]"
    assert set(error) == {"error"}
    assert error["error"]["message"] == "The engine has crashed."
