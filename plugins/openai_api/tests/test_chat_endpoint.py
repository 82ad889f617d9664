"""/v1/chat/completions on a scripted engine: shapes, fields and streams."""

from __future__ import annotations

import json

import pytest

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'


async def test_an_answer_has_the_published_shape(scripted, fits) -> None:
    response = await scripted().chat()
    answer = response.json()
    assert response.status_code == 200
    fits("CreateChatCompletionResponse", answer)
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "The llama is a camelid."
    assert choice["message"]["refusal"] is None
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_parts_of_content_are_its_text(scripted) -> None:
    server = scripted()
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    await server.post("/v1/chat/completions", messages=[{"role": "user", "content": parts}])
    assert "Hel\nlo" in server.engine.prompts[0]


async def test_all_roles_and_repeated_ones_are_taken(scripted) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is the weather?", "name": "ann"},
        {"role": "user", "content": "In Lima."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Fog."},
    ]
    server = scripted()
    response = await server.post("/v1/chat/completions", messages=messages, tools=[WEATHER])
    assert response.status_code == 200, response.text
    prompt = server.engine.prompts[0]
    for text in ("Be brief.", "Be kind.", "What is the weather?", "In Lima.", '"city": "Lima"', "Fog."):
        assert text in prompt


async def test_several_choices_have_their_numbers_and_the_prompt_counts_once(scripted, fits) -> None:
    server = scripted(["one", "three"])
    answer = (await server.chat(n=2)).json()
    fits("CreateChatCompletionResponse", answer)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"one", "three"}
    single = (await scripted("one").chat()).json()["usage"]
    assert answer["usage"]["prompt_tokens"] == single["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == len("one") + len("three")


async def test_a_seed_gives_the_same_text_again_and_each_choice_another(scripted) -> None:
    server = scripted(None)
    first, again, other = [
        [choice["message"]["content"] for choice in (await server.chat(n=2, seed=seed)).json()["choices"]]
        for seed in (1, 1, 2)
    ]
    assert first == again
    assert first != other
    assert first[0] != first[1]


async def test_what_a_request_leaves_out_is_as_openai_documents_it_unless_the_server_says_otherwise(scripted) -> None:
    server = scripted()
    await server.chat()
    assert (server.engine.requests[0].sampling.temperature, server.engine.requests[0].sampling.top_p) == (1.0, 1.0)
    server = scripted(temperature=0.0, top_k=40)
    await server.chat()
    await server.chat(temperature=0.5, top_k=-1, top_p=0)
    assert (server.engine.requests[0].sampling.temperature, server.engine.requests[0].sampling.top_k) == (0.0, 40)
    asked = server.engine.requests[1].sampling
    assert (asked.temperature, asked.top_k) == (0.5, 0)
    assert 0 < asked.top_p < 0.001


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_the_longest_answer_is_kept_to(scripted, field) -> None:
    answer = (await scripted().chat(**{field: 3})).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_bytes_of_logprobs_join_to_the_content_and_alternatives_are_sorted(scripted, fits) -> None:
    server = scripted("Olá, 世界! Stop here", engine={"by": "character"})
    response = await server.chat(logprobs=True, top_logprobs=3, stop=" Stop")
    answer = response.json()
    fits("CreateChatCompletionResponse", answer)
    (choice,) = answer["choices"]
    tokens = choice["logprobs"]["content"]
    assert choice["message"]["content"] == "Olá, 世界!"
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == "Olá, 世界!"
    for token in tokens:
        assert token["logprob"] <= 0
        values = [each["logprob"] for each in token["top_logprobs"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)


async def test_a_stream_has_the_published_shape_and_joins_to_the_whole_answer(scripted, fits) -> None:
    server = scripted()
    *chunks, done = await server.events("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}])
    assert done == "[DONE]"
    for chunk in chunks:
        fits("CreateChatCompletionStreamResponse", chunk)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len(chunks) > 5
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    assert "role" in deltas[0]
    assert "".join(delta.get("content", "") for delta in deltas) == "The llama is a camelid."
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)


async def test_usage_comes_last_in_a_stream_and_is_that_of_the_whole_answer(scripted, fits) -> None:
    server = scripted()
    messages = [{"role": "user", "content": "Hi"}]
    *chunks, last, _ = await server.events(
        "/v1/chat/completions", messages=messages, stream_options={"include_usage": True}
    )
    fits("CreateChatCompletionStreamResponse", last)
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"] == (await server.post("/v1/chat/completions", messages=messages)).json()["usage"]


async def test_no_beginning_of_a_stop_text_leaks_into_a_stream(scripted) -> None:
    server = scripted("one two ENDE three END. four", engine={"by": "character"})
    messages = [{"role": "user", "content": "Hi"}]
    events = await server.events("/v1/chat/completions", messages=messages, stop=["END."], n=2)
    for index in (0, 1):
        own = [each["choices"][0] for each in events[:-1] if each["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "one two ENDE three "
        assert own[-1]["finish_reason"] == "stop"


async def test_logprobs_of_a_stream_are_those_of_the_whole_answer(scripted) -> None:
    server = scripted("Olá, 世界!", engine={"by": "character"})
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1}
    whole = (await server.post("/v1/chat/completions", **body)).json()["choices"][0]["logprobs"]["content"]
    events = await server.events("/v1/chat/completions", **body)
    choices = [each["choices"][0] for each in events[:-1]]
    assert [token for choice in choices for token in (choice["logprobs"] or {"content": []})["content"]] == whole


async def test_a_forced_call_fits_its_tool(scripted, fits) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = (await scripted(None).chat(tools=[WEATHER], tool_choice=choice)).json()
        fits("CreateChatCompletionResponse", answer)
        (found,) = answer["choices"]
        assert found["finish_reason"] == "tool_calls"
        assert found["message"]["content"] is None
        (call,) = found["message"]["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "weather")
        assert isinstance(json.loads(call["function"]["arguments"])["city"], str)


async def test_a_call_may_come_after_text_and_another_after_it(scripted) -> None:
    answer = (await scripted(f"I look it up. {CALL}\n{CALL}").chat(tools=[WEATHER])).json()
    message = answer["choices"][0]["message"]
    assert message["content"].strip() == "I look it up."
    assert len(message["tool_calls"]) == 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    single = await scripted(f"{CALL}\n{CALL}").chat(tools=[WEATHER], parallel_tool_calls=False)
    assert len(single.json()["choices"][0]["message"].get("tool_calls", [])) <= 1


async def test_a_streamed_call_names_its_function_first_and_then_its_arguments(scripted, fits) -> None:
    server = scripted(CALL)
    messages = [{"role": "user", "content": "Hi"}]
    *chunks, _ = await server.events("/v1/chat/completions", messages=messages, tools=[WEATHER])
    for chunk in chunks:
        fits("CreateChatCompletionStreamResponse", chunk)
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert deltas[0]["id"].startswith("call_")
    assert deltas[0]["function"]["name"] == "weather"
    assert {delta["index"] for delta in deltas} == {0}
    assert json.loads("".join(delta["function"]["arguments"] for delta in deltas)) == {"city": "Lima"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_tools_that_must_not_be_used_are_not_shown(scripted) -> None:
    server = scripted()
    answer = (await server.chat(tools=[WEATHER], tool_choice="none")).json()
    assert "tool_calls" not in answer["choices"][0]["message"]
    assert "weather" not in server.engine.prompts[0]


async def test_json_is_what_was_asked_for(scripted) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = (await scripted(None).chat(response_format=wanted)).json()
    found = json.loads(answer["choices"][0]["message"]["content"])
    assert set(found) == {"name", "age"}
    assert isinstance(found["age"], int)
    answer = (await scripted(None).chat(response_format={"type": "json_object"})).json()
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)


async def test_extensions_reach_the_engine(scripted) -> None:
    server = scripted(None)
    answer = (
        await server.chat(
            top_k=7, repetition_penalty=1.2, min_p=0.0, return_token_ids=True, structured_outputs={"regex": "[ab]{3}"}
        )
    ).json()
    (request,) = server.engine.requests
    assert (request.sampling.top_k, request.sampling.repetition_penalty) == (7, 1.2)
    text = answer["choices"][0]["message"]["content"]
    assert len(text) == 3
    assert answer["choices"][0]["token_ids"][:3] == list(text.encode())


async def test_the_old_key_of_content_is_read_and_said_to_be_old(scripted) -> None:
    server = scripted()
    old = await server.post("/v1/chat/completions", messages=[{"role": "user", "message": "Where is Lima?"}])
    assert old.status_code == 200
    assert old.headers["deprecation"].startswith("@")
    assert "Where is Lima?" in server.engine.prompts[0]
    assert "deprecation" not in (await server.chat()).headers
    strict = await scripted(strict=True).post(
        "/v1/chat/completions", model="fake", messages=[{"role": "user", "message": "Where is Lima?"}]
    )
    assert (strict.status_code, strict.json()["error"]["param"]) == (400, "messages")


async def test_a_strict_server_wants_a_model_named(scripted) -> None:
    assert (await scripted(strict=True).chat()).json()["error"]["param"] == "model"
    assert (await scripted(strict=True).chat(model="fake")).status_code == 200
    assert (await scripted().chat()).status_code == 200


HARMLESS = {
    "user": "ann", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x",
    "prompt_cache_key": "k", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "modalities": ["text"],
    "response_format": {"type": "text"}, "n": 1, "stream": False, "logprobs": False, "seed": None, "stop": None,
}  # fmt: skip


async def test_fields_that_change_nothing_are_taken(scripted) -> None:
    response = await scripted().chat(**HARMLESS)
    assert response.status_code == 200, response.text


async def test_a_call_is_chosen_among_the_allowed_tools(scripted) -> None:
    other = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    server = scripted(None)
    answer = (await server.chat(tools=[WEATHER, other], tool_choice=choice, max_tokens=100)).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "time"
    assert "weather" not in server.engine.prompts[0]
