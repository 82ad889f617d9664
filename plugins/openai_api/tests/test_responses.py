"""/v1/responses on a scripted engine: shapes, order of events, what is kept, and what is refused."""

from __future__ import annotations

import json
import sqlite3

import pytest

from calpaca.core.errors import ModelError
from calpaca_openai_api.settings import KeySettings, digest

PATH = "/v1/responses"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": None}


async def test_a_response_fits_the_published_schema_and_is_kept(server, fits):
    asked = server()
    made = (await asked.post(PATH, input="Hi", instructions="Be brief.", metadata={"a": "b"})).json()
    fits("Response", made)
    assert made["id"].startswith("resp_")
    assert made["status"] == "completed"
    assert made["output"][0]["content"][0]["text"] == "The llama is a camelid."
    assert made["usage"]["total_tokens"] == made["usage"]["input_tokens"] + made["usage"]["output_tokens"]
    assert (await asked.client.get(f"{PATH}/{made['id']}")).json() == made


async def test_every_event_fits_its_schema_in_the_published_order(server, streamed_response, fits_event):
    events = await streamed_response(server(), input="Hi")
    for event in events:
        fits_event(event)
    kinds = [event["type"].removeprefix("response.") for event in events]
    text = ["output_item.added", "content_part.added", "output_text.delta"]
    assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before] == [
        "created", "in_progress", *text, "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = "".join(event["delta"] for event in events if event["type"].endswith("text.delta"))
    assert deltas == events[-4]["text"] == events[-1]["response"]["output"][0]["content"][0]["text"]


async def test_what_a_stream_ends_with_is_what_is_kept(server, streamed_response):
    asked = server()
    last = (await streamed_response(asked, input="Hi"))[-1]["response"]
    assert (await asked.client.get(f"{PATH}/{last['id']}")).json() == last


async def test_a_response_that_is_not_to_be_stored_is_not(server):
    asked = server()
    id = (await asked.post(PATH, input="Hi", store=False)).json()["id"]
    assert (await asked.client.get(f"{PATH}/{id}")).status_code == 404
    assert (await asked.post(PATH, input="Go on", previous_response_id=id)).status_code == 400


async def test_a_deleted_response_is_gone(server, fits):
    asked = server()
    id = (await asked.post(PATH, input="Hi")).json()["id"]
    assert (await asked.client.delete(f"{PATH}/{id}")).json() == {"id": id, "object": "response", "deleted": True}
    for gone in (
        await asked.client.get(f"{PATH}/{id}"),
        await asked.client.delete(f"{PATH}/{id}"),
        await asked.client.get(f"{PATH}/{id}/input_items"),
    ):
        assert gone.status_code == 404
        fits("ErrorResponse", gone.json())


async def test_input_items_are_listed_in_pages(server, fits):
    asked = server()
    items = [{"role": "user", "content": f"Number {number}"} for number in range(3)]
    id = (await asked.post(PATH, input=items)).json()["id"]
    page = (await asked.client.get(f"{PATH}/{id}/input_items", params={"order": "asc", "limit": 2})).json()
    fits("ResponseItemList", page)
    assert [item["content"][0]["text"] for item in page["data"]] == ["Number 0", "Number 1"]
    assert page["has_more"]
    rest = (
        await asked.client.get(f"{PATH}/{id}/input_items", params={"order": "asc", "after": page["last_id"]})
    ).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["Number 2"]
    newest = (await asked.client.get(f"{PATH}/{id}/input_items", params={"limit": 1})).json()
    assert newest["data"][0]["content"][0]["text"] == "Number 2"
    assert (await asked.client.get(f"{PATH}/{id}/input_items", params={"limit": 0})).status_code == 400


async def test_a_response_goes_on_from_another_without_its_instructions(server):
    asked = server(["First.", "Second.", "Third.", "Fourth."])
    first = (await asked.post(PATH, input="One", instructions="Be kind.")).json()["id"]
    second = (await asked.post(PATH, input="Two", previous_response_id=first)).json()["id"]
    await asked.post(PATH, input="Three", previous_response_id=second)
    prompt = asked.engine.decode(list(asked.engine.requests[-1].prompt))
    assert all(text in prompt for text in ("One", "First.", "Two", "Second.", "Three"))
    assert "Be kind." not in prompt
    again = await asked.post(PATH, input="Other", previous_response_id=first)
    assert again.status_code == 200


async def test_a_chain_with_a_lost_response_is_refused_by_its_id(server):
    asked = server(["First.", "Second."])
    first = (await asked.post(PATH, input="One")).json()["id"]
    second = (await asked.post(PATH, input="Two", previous_response_id=first)).json()["id"]
    await asked.client.delete(f"{PATH}/{first}")
    refused = await asked.post(PATH, input="Three", previous_response_id=second)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "previous_response_not_found"
    assert first in refused.json()["error"]["message"]


async def test_a_kept_response_outlives_the_server(server):
    made = (await server().post(PATH, input="Hi")).json()
    assert (await server().client.get(f"{PATH}/{made['id']}")).json() == made


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("reasoning", {"reasoning": {"effort": "high"}}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "p"}}),
        ("context_management", {"context_management": []}),
        ("max_tool_calls", {"max_tool_calls": 3}),
        ("include", {"include": ["file_search_call.results"]}),
        ("tools", {"tools": [{"type": "web_search"}]}),
        ("input.0", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        ("input.0.content.0", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
        ("stream_options.include_obfuscation", {"stream": True, "stream_options": {"include_obfuscation": True}}),
    ],
)
async def test_what_is_not_done_is_refused_by_name(server, fits, field, fields):
    refused = await server().post(PATH, **{"input": "Hi", **fields})
    assert refused.status_code == 400, refused.text
    fits("ErrorResponse", refused.json())
    assert refused.json()["error"]["param"] == field
    assert refused.json()["error"]["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("input", {}),
        ("input", {"input": []}),
        ("input", {"input": 3}),
        ("input.0.role", {"input": [{"role": "pirate", "content": "Hi"}]}),
        ("input.0.call_id", {"input": [{"type": "function_call_output", "output": "3"}]}),
        ("max_output_tokens", {"input": "Hi", "max_output_tokens": 1}),
        ("text.format", {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "a"}}}),
        ("tool_choice", {"input": "Hi", "tool_choice": "required"}),
        ("tools", {"input": "Hi", "tools": [{"type": "function"}]}),
        ("stream_options", {"input": "Hi", "stream_options": {}}),
        ("store", {"input": "Hi", "background": True, "store": False}),
        ("truncation", {"input": "Hi", "truncation": "always"}),
        ("truncation", {"input": "Hi", "truncation": "auto", "model": "app:retrieval_qa"}),
        ("colour", {"input": "Hi", "colour": "red"}),
    ],
)
async def test_wrong_fields_are_named(server, field, fields):
    refused = await server().post(PATH, **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == field


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'


async def test_calls_and_their_outputs_go_there_and_back(server, streamed_response, fits):
    asked = server(f"I look it up. {CALL}")
    events = await streamed_response(asked, input="Weather?", tools=[WEATHER])
    fits("Response", events[-1]["response"])
    message, call = events[-1]["response"]["output"]
    assert (message["type"], call["type"], call["name"]) == ("message", "function_call", "weather")
    (done,) = [event for event in events if event["type"].endswith("arguments.done")]
    fits("ResponseFunctionCallArgumentsDoneEvent", done)
    assert json.loads(done["arguments"]) == {"city": "Lima"} == json.loads(call["arguments"])
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "It is foggy."}
    second = await asked.post(PATH, input=[output], tools=[WEATHER], previous_response_id=events[-1]["response"]["id"])
    assert second.status_code == 200, second.text
    assert "It is foggy." in asked.engine.decode(list(asked.engine.requests[-1].prompt))


async def test_a_store_that_cannot_be_opened_is_an_error_object(server, tmp_path, fits):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "responses.sqlite").write_bytes(b"no database at all" * 100)
    asked = server()
    failed = await asked.post(PATH, input="Hi")
    assert failed.status_code == 500
    fits("ErrorResponse", failed.json())
    assert (await asked.post(PATH, input="Hi", store=False)).status_code == 200
    with pytest.raises(sqlite3.DatabaseError):
        asked.api.background.responses.find("", "resp_1")


# What goes wrong, and for whom ---------------------------------------------------------------------------------------


async def test_an_engine_that_crashes_in_a_stream_ends_it_with_a_failed_response(
    server, streamed_response, monkeypatch, fits_event
):
    asked = server("one two three")
    chunks = asked.engine._chunks

    def failing(work):
        yield next(chunks(work))
        raise ModelError("The engine has crashed.")

    monkeypatch.setattr(asked.engine, "_chunks", failing)
    events = await streamed_response(asked, input="Hi")
    for event in events:
        fits_event(event)
    failed = events[-1]["response"]
    assert (events[-1]["type"], failed["status"]) == ("response.failed", "failed")
    assert failed["error"] == {"code": "server_error", "message": "The engine has crashed."}
    assert failed["output"][0]["status"] == "incomplete"
    assert (await asked.client.get(f"{PATH}/{failed['id']}")).json() == failed
    whole = await asked.post(PATH, input="Hi")
    assert (whole.status_code, whole.json()["error"]["message"]) == (500, "The engine has crashed.")
    assert asked.api.admission.running == 0


async def test_a_response_is_the_keys_own(server):
    keys = {name: KeySettings(sha256=digest(name)) for name in ("ann", "bob")}
    asked = server(keys=keys)
    asked.client.headers["Authorization"] = "Bearer ann"
    id = (await asked.post(PATH, input="Hi")).json()["id"]
    assert (await asked.client.get(f"{PATH}/{id}")).status_code == 200
    asked.client.headers["Authorization"] = "Bearer bob"
    for path, method in ((id, "GET"), (id, "DELETE"), (f"{id}/input_items", "GET"), (f"{id}/cancel", "POST")):
        assert (await asked.client.request(method, f"{PATH}/{path}")).status_code == 404
    refused = await asked.post(PATH, input="Go on", previous_response_id=id)
    assert refused.json()["error"]["code"] == "previous_response_not_found"


# truncation: auto ----------------------------------------------------------------------------------------------------


def conversation(turns: int) -> list[dict]:
    said = [[("user", f"Question {number}?"), ("assistant", f"Answer {number}.")] for number in range(turns)]
    items = [{"role": role, "content": text} for turn in said for role, text in turn]
    return [*items, {"role": "user", "content": "And the last question?"}]


async def test_the_oldest_turns_go_until_the_rest_fits_exactly(server, fits):
    asked = server(engine={"context_length": 600})
    fields = {"input": conversation(12), "instructions": "Be brief.", "max_output_tokens": 100}
    overflow = await asked.post(PATH, **fields)
    assert overflow.json()["error"]["code"] == "context_length_exceeded"
    made = (await asked.post(PATH, truncation="auto", **fields)).json()
    fits("Response", made)
    assert (made["status"], made["truncation"]) == ("completed", "auto")
    prompt = asked.engine.prompts[-1]
    gone = sum(f"Question {number}?" not in prompt for number in range(12))
    assert 0 < gone < 12
    assert all((f"Question {n}?" in prompt) == (f"Answer {n}." in prompt) == (n >= gone) for n in range(12))
    assert "Be brief." in prompt
    turn = len("<|im_start|>user\nQuestion 0?<|im_end|>\n<|im_start|>assistant\nAnswer 0.<|im_end|>\n")
    assert made["usage"]["input_tokens"] <= 500 < made["usage"]["input_tokens"] + turn
    (notice,) = made["notices"]
    assert f"({2 * gone}, {gone * turn} tokens)" in notice


async def test_what_fits_is_left_as_it_is_and_a_last_turn_that_does_not_is_an_error(server):
    asked = server(engine={"context_length": 600})
    made = (await asked.post(PATH, input=conversation(2), truncation="auto")).json()
    assert "notices" not in made
    assert all(f"Question {number}?" in asked.engine.prompts[-1] for number in range(2))
    items = [*conversation(3), {"role": "user", "content": "a" * 700}]
    refused = await asked.post(PATH, input=items, truncation="auto")
    assert refused.json()["error"]["code"] == "context_length_exceeded"


async def test_a_call_goes_together_with_its_output(server):
    asked = server(engine={"context_length": 700})
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Lima"}'}
    output = {"type": "function_call_output", "call_id": "c", "output": "Fog."}
    turns = [{"role": "user", "content": "Weather?"}, call, output, *conversation(5)]
    made = await asked.post(PATH, input=turns, truncation="auto", max_output_tokens=200)
    assert made.status_code == 200, made.text
    assert not any(text in asked.engine.prompts[-1] for text in ("Weather?", "Lima", "Fog."))


async def test_turns_of_earlier_responses_are_dropped_too(server):
    asked = server(["word " * 30] * 9, engine={"context_length": 700})
    last = None
    for number in range(6):
        made = await asked.post(
            PATH, input=f"Turn {number}", previous_response_id=last, truncation="auto", max_output_tokens=160
        )
        assert made.status_code == 200, made.text
        last = made.json()["id"]
    assert "Turn 0" not in asked.engine.prompts[-1]
    assert made.json()["notices"]
