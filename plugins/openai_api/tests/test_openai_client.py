"""OpenAI's own client, with strict validation of responses, against a running server with SmolLM2 and e5."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx2
import openai
import pytest
from pydantic import BaseModel

from calpaca.core.engine import Grammar, Sampling
from calpaca.core.spec import ModelSpec
from calpaca_openai_api.served import ServedApp, ServedEmbedder, ServedModel

MODEL = "smollm2-135m-instruct"
EMBEDDING = "multilingual-e5-small"
USER = [{"role": "user", "content": "What is a llama? Answer in one sentence."}]
LONG = [{"role": "user", "content": "Count from one to one thousand, in words, one number a line."}]


@pytest.fixture
def client(running):
    with openai.OpenAI(
        base_url=f"{running.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
async def aclient(running):
    async with openai.AsyncOpenAI(
        base_url=f"{running.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
async def embedder(running):
    """Without strict validation: the client asks for base64 and then refuses it, since the schema says floats."""
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_and_retrieved(client):
    ids = [model.id for model in client.models.list()]
    assert ids == [MODEL, "half", EMBEDDING, "app:retrieval_qa", "app:summarize", "app:handbook"]
    assert client.models.retrieve(MODEL).owned_by == "calpaca"
    assert client.models.retrieve("app:handbook").id == "app:handbook"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-9")
    assert error.value.code == "model_not_found"


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = client.chat.completions.create(model=MODEL, messages=USER, temperature=0, max_tokens=40)
    stream = client.chat.completions.create(
        model=MODEL, messages=USER, temperature=0, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert "llama" in text.lower()
    last = chunks[-1].usage
    assert (last.prompt_tokens, last.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert len(chunks) > 10


def test_the_clients_own_stream_helper_ends_with_the_whole_completion(client):
    with client.chat.completions.stream(model=MODEL, messages=USER, temperature=0, stop=".") as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    whole = client.chat.completions.create(model=MODEL, messages=USER, temperature=0, stop=".")
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_an_answer_is_parsed_into_a_class(client):
    class Animal(BaseModel):
        name: str
        legs: int

    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Describe a llama."}], response_format=Animal, max_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, Animal)


def test_a_named_function_is_called(client):
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    asked = [{"role": "user", "content": "How is the weather in Lima?"}]
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(
        model=MODEL, messages=asked, tools=[tool], tool_choice=choice, temperature=0, max_tokens=60
    )
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert set(json.loads(call.function.arguments)) == {"city"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "Fog, 17 degrees."}
    after = client.chat.completions.create(
        model=MODEL, messages=[*asked, message.model_dump(exclude_none=True), result], tools=[tool], max_tokens=20
    )
    assert after.choices[0].message.content


def test_logprobs_join_to_the_content_and_a_stop_text_cuts_it(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, temperature=0, max_tokens=30, logprobs=True, top_logprobs=2, stop=[" a "]
    )
    (choice,) = answer.choices
    assert " a " not in choice.message.content
    joined = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert joined.decode() == choice.message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_a_seed_repeats_a_sampled_text(client):
    def ask(seed):
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, temperature=1.5, seed=seed, max_tokens=16, n=2
        )
        return [choice.message.content for choice in answer.choices]

    assert ask(1) == ask(1) != ask(2)


def test_completions_take_texts_and_token_ids_alone_and_beside_others(client, running):
    short, long = "The capital of France is", "Llamas live in the mountains. " * 20 + "The capital of Peru is"
    alone = client.completions.create(model=MODEL, prompt=short, temperature=0, max_tokens=8)
    both = client.completions.create(model=MODEL, prompt=[short, long], temperature=0, max_tokens=8, logprobs=3)
    assert both.choices[0].text == alone.choices[0].text
    assert "Paris" in alone.choices[0].text
    ids = running.api.models.main.load().engine.encode(short, special_tokens=True)
    again = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=8, echo=True)
    assert again.choices[0].text == short + alone.choices[0].text
    assert again.usage.prompt_tokens == len(ids)
    found = both.choices[0].logprobs
    assert "".join(found.tokens) == both.choices[0].text
    assert all(3 <= len(top) <= 4 for top in found.top_logprobs)


def test_the_token_that_ends_a_completion_is_listed(client):
    """lm-eval takes it for granted that one token is generated, whatever the model writes."""
    ends = {"logit_bias": {"2": 100}, "max_tokens": 1, "temperature": 0}
    (choice,) = client.completions.create(model=MODEL, prompt="Llamas live here.", logprobs=1, **ends).choices
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert choice.logprobs.tokens == [""]  # it stands for no text
    assert choice.logprobs.text_offset == [0]


def test_the_prompt_that_is_scored_is_a_known_miss_of_the_strict_client(client, running):
    """The published schema has numbers alone, and nothing precedes a prompt's first token: OpenAI sent null there, and
    lm-eval reads it so. Without strict validation the client takes it."""
    asked = {"model": MODEL, "prompt": "The capital of France is", "echo": True, "logprobs": 1, "max_tokens": 1}
    with pytest.raises(openai.APIResponseValidationError):
        client.completions.create(**asked)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as lenient:
        found = lenient.completions.create(**asked).choices[0].logprobs
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])


def test_a_token_id_outside_the_vocabulary_is_refused(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[1, 999_999_999])


def test_a_context_that_overflows_is_told_with_numbers(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=USER, max_tokens=100_000, stream=True)
    assert error.value.code == "context_length_exceeded"
    assert "8192" in error.value.message


async def test_embeddings_alone_and_together_are_the_same(embedder, aclient):
    texts = ["Who keeps the key?", "今天天气真不错", "a " * 300]
    together = await embedder.embeddings.create(model=EMBEDDING, input=texts)
    for text, found in zip(texts, together.data, strict=True):
        alone = await aclient.embeddings.create(model=EMBEDDING, input=text, encoding_format="float")
        assert found.embedding == pytest.approx(alone.data[0].embedding, abs=1e-3)
        assert len(found.embedding) == 384
    assert together.usage.total_tokens > 300


async def test_token_ids_are_embedded_as_their_text(embedder, running):
    tokenizer = (await running.api.models.embedder.get())._model.tokenizer
    ids = tokenizer("Who keeps the key?", add_special_tokens=False)["input_ids"]
    by_ids = await embedder.embeddings.create(model=EMBEDDING, input=[ids])
    by_text = await embedder.embeddings.create(model=EMBEDDING, input="Who keeps the key?")
    assert by_ids.data[0].embedding == pytest.approx(by_text.data[0].embedding, abs=1e-3)
    with pytest.raises(openai.BadRequestError):
        await embedder.embeddings.create(model=EMBEDDING, input=[[10**8]])


async def test_requests_at_once_are_answered_as_alone(aclient):
    questions = [f"Name {count} animals of the mountains." for count in range(2, 10)]

    async def ask(question):
        messages = [{"role": "user", "content": question}]
        answer = await aclient.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=12)
        return answer.choices[0].message.content

    together = await asyncio.gather(*map(ask, questions))
    assert together == [await ask(question) for question in questions]


async def test_an_app_answers_with_its_sources(aclient, fits):
    question = [{"role": "system", "content": "x"}, {"role": "user", "content": "Who keeps the key of the archive?"}]
    answer = await aclient.chat.completions.create(model="app:handbook", messages=question, max_tokens=40)
    fits("CreateChatCompletionResponse", json.loads(answer.to_json()))
    assert "Abendroth" in answer.choices[0].message.content
    assert answer.model_extra["sources"][0]["source"].endswith("handbook.md")
    assert answer.usage.completion_tokens > 0
    stream = await aclient.chat.completions.create(
        model="app:handbook", messages=question, max_tokens=40, stream=True, extra_body={"options": {"k": 1}}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Abendroth" in text
    assert len(chunks[-1].model_extra["sources"]) == 1


async def test_a_text_is_summed_up_and_the_notices_say_that_all_of_it_was_read(aclient, fits):
    told = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "The lamp of the tower is lit by Mrs Abendroth at nine. " * 40},
    ]
    asked = {"model": "app:summarize", "messages": told, "max_tokens": 24}
    options = {"strategy": "map_reduce", "chunk_size": 200, "length": "short"}
    answer = await aclient.chat.completions.create(**asked, extra_body={"options": options})
    fits("CreateChatCompletionResponse", json.loads(answer.to_json()))
    assert answer.choices[0].message.content
    assert any("Coverage 1.0: 2,199 characters in 4 chunks" in notice for notice in answer.model_extra["notices"])
    assert any("messages before the last question (2)" in notice for notice in answer.model_extra["notices"])
    assert answer.usage.prompt_tokens > 600  # every chunk was sent
    stream = await aclient.chat.completions.create(**asked, stream=True, extra_body={"options": options})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content  # of the last step alone
    for name, value in {"files": ["/etc/passwd"], "chat_template": "/etc/passwd", "model": "x"}.items():
        with pytest.raises(openai.PermissionDeniedError) as error:
            await aclient.chat.completions.create(**asked, extra_body={"options": {name: value}})
        assert error.value.param == f"options.{name}"


async def test_a_follow_up_question_to_an_app_is_read_with_the_turns_before_it(aclient):
    messages = [{"role": "user", "content": "Who keeps the key of the archive?"}]
    first = await aclient.chat.completions.create(model="app:handbook", messages=messages, max_tokens=40)
    assert first.model_extra["notices"] == []
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "And on which floor?"})
    answer = await aclient.chat.completions.create(model="app:handbook", messages=messages, max_tokens=40)
    assert "second" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens
    alone = await aclient.chat.completions.create(model="app:handbook", messages=messages[-1:], max_tokens=40)
    assert alone.usage.prompt_tokens < answer.usage.prompt_tokens
    messages.insert(0, {"role": "system", "content": "Answer in French."})
    answer = await aclient.chat.completions.create(model="app:handbook", messages=messages, max_tokens=40)
    (notice,) = answer.model_extra["notices"]
    assert "system messages" in notice


async def test_an_apps_files_and_models_are_not_the_clients_to_choose(aclient):
    for name, value in {
        "files": ["/etc/passwd"],
        "prompt_file": "/etc/passwd",
        "make_evalset": "/tmp/x",
        "session": "somebody-else",
        "model": "x",
        "trust_remote_code": True,
    }.items():
        with pytest.raises(openai.PermissionDeniedError) as error:
            await aclient.chat.completions.create(
                model="app:handbook", messages=USER, extra_body={"options": {name: value}}
            )
        assert error.value.param == f"options.{name}"
    for fields in ({"n": 2}, {"logprobs": True}, {"extra_body": {"options": {"kk": 1}}}):
        with pytest.raises(openai.BadRequestError):
            await aclient.chat.completions.create(model="app:handbook", messages=USER, **fields)


# Clients that go away ------------------------------------------------------------------------------------------------


async def test_closing_a_stream_frees_its_slot(aclient, running):
    stream = await aclient.chat.completions.create(model=MODEL, messages=LONG, max_tokens=2000, stream=True)
    async for _ in stream:
        break
    assert running.rows == 1
    await stream.close()
    assert running.settle()


async def test_giving_up_on_a_whole_answer_frees_its_slot(aclient, running, until):
    task = asyncio.create_task(aclient.chat.completions.create(model=MODEL, messages=LONG, max_tokens=2000, n=2))
    assert await until(lambda: running.rows == 2)
    task.cancel()
    assert await until(running.settle)


async def test_giving_up_on_an_app_stops_its_work(aclient, running, until):
    question = [{"role": "user", "content": "Who keeps the key of the archive?"}]
    await aclient.chat.completions.create(model="app:handbook", messages=question)  # the first one loads and indexes
    task = asyncio.create_task(aclient.chat.completions.create(model="app:handbook", messages=question))
    assert await until(lambda: running.api.admission.running == 1)
    task.cancel()
    assert await until(running.settle)


@pytest.mark.parametrize("kind", ["model", "app", "embedding"])
async def test_giving_up_while_something_is_loaded_for_the_first_time_is_noticed_at_once(
    running, until, monkeypatch, caplog, kind
):
    """The loading itself goes on: the next client wants it."""
    caplog.set_level("INFO", logger="calpaca.access")
    begun, loaded = threading.Event(), threading.Event()

    def load(*_: object) -> None:
        begun.set()
        loaded.wait(60)

    models = running.api.models
    if kind == "model":
        served = ServedModel("late", ModelSpec(model=MODEL), running.runtime)
        monkeypatch.setattr(served, "load", load)
    elif kind == "app":
        served = ServedApp(models.find("app:handbook").instance, {}, running.runtime)
        served.id = "late"
        monkeypatch.setattr(served.runs, "_runner", load)
    else:
        served = ServedEmbedder("late", EMBEDDING, SimpleNamespace(embedder=load))
    monkeypatch.setattr(models, "_by_id", {**models._by_id, "late": served})
    path, fields = ("embeddings", {"input": "a"}) if kind == "embedding" else ("chat/completions", {"messages": USER})
    async with httpx2.AsyncClient() as client:
        task = asyncio.create_task(client.post(f"{running.url}/v1/{path}", json={"model": "late", **fields}))
        assert await until(begun.is_set)
        task.cancel()
        assert await until(lambda: running.api.admission.running == 0 and '"status": 499' in caplog.text, 3)
    assert not loaded.is_set()
    loaded.set()


def test_many_clients_that_go_away_at_once_leave_nothing_behind(running):
    body = json.dumps({"messages": LONG, "max_tokens": 500, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    port = int(running.url.rpartition(":")[2])
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(500)]
    for each in sockets:
        each.sendall(head.encode() + body)
    time.sleep(0.5)
    for each in sockets:
        each.close()
    assert running.settle(20)
    assert httpx2.get(f"{running.url}/health").status_code == 200


def test_a_client_that_reads_a_byte_a_second_holds_nobody_up(running):
    body = json.dumps({"messages": USER, "max_tokens": 30, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as slow:
        slow.sendall(head.encode() + body)
        for _ in range(2):
            assert len(slow.recv(1)) == 1
            time.sleep(1)
            answer = httpx2.post(f"{running.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=30)
            assert answer.status_code == 200
    assert running.settle()


# Bytes on the wire ---------------------------------------------------------------------------------------------------


def test_a_stream_is_server_sent_events_as_they_come(running):
    body = {"messages": USER, "stream": True, "max_tokens": 30, "temperature": 0}
    arrived = []
    with httpx2.stream("POST", f"{running.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        data = b""
        for part in response.iter_raw():
            arrived.append(time.monotonic())
            data += part
    frames = data.split(b"\n\n")
    assert frames.pop() == b""
    assert all(frame.startswith(b"data: ") and b"\n" not in frame for frame in frames)
    assert frames[-1] == b"data: [DONE]"
    assert len(arrived) > 10
    data.decode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "告诉我中国的首都在哪里"}),
        (
            "chat/completions",
            {"messages": [{"role": "user", "message": "给我讲一些有关杭州的故事吧"}], "repetition_penalty": 1.0},
        ),
        ("embeddings", {"input": "今天天气真不错"}),
    ],
)
def test_the_calls_of_the_original_tutorial_work_as_they_stand(running, path, body):
    if path == "chat/completions":
        body = {**body, "max_tokens": 64}  # the rest is as it was; an answer of 512 tokens takes long here
    response = httpx2.post(f"{running.url}/v1/{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text


def test_two_models_at_once_do_not_mix(running):
    def ask(model):
        body = {"model": model, "messages": USER, "temperature": 0, "max_tokens": 12}
        answer = httpx2.post(f"{running.url}/v1/chat/completions", json=body, timeout=120).json()
        return answer["model"], answer["choices"][0]["message"]["content"]

    assert ask("half")[0] == "half"
    assert ask(MODEL) == ask(MODEL)


# calpaca's own engine for servers ------------------------------------------------------------------------------------


def test_calpacas_remote_engine_gets_the_same_answers_as_the_local_one(running):
    local = running.api.models.main.load()
    remote = running.runtime.model(f"{running.url}/v1#{MODEL}")
    assert remote.engine.capabilities().details["server"] == "calpaca"
    sampling = Sampling(max_new_tokens=12)
    messages = [{"role": "user", "content": "Name a mountain."}]
    theirs, ours = remote.chat(messages, sampling).result(60), local.chat(messages, sampling).result(60)
    assert (theirs.text, theirs.token_ids, theirs.finish_reason) == (ours.text, ours.token_ids, ours.finish_reason)
    assert remote.count_tokens(messages) == local.count_tokens(messages)
    assert remote.engine.encode("Hello there") == local.engine.encode("Hello there")
    grammar = Grammar("regex", "(yes|no)")
    assert remote.chat(messages, sampling, grammar=grammar).result(60).text in ("yes", "no")


def test_a_response_is_continued_streamed_kept_and_deleted(client):
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
    first = client.responses.create(input="What is the capital of France?", **asked)
    assert (first.status, first.output_text) == ("completed", "The capital of France is Paris.")
    with client.responses.stream(input="What is the capital of France?", **asked) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == first.output_text
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    second = client.responses.create(input="And of Spain?", previous_response_id=first.id, **asked)
    assert "Madrid" in second.output_text
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert [item.content[0].text for item in client.responses.input_items.list(second.id)] == ["And of Spain?"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="not found"):
        client.responses.create(input="And of Italy?", previous_response_id=first.id, **asked)


def test_a_response_is_parsed_and_calls_a_function(client):
    class Capital(BaseModel):
        city: str

    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 60}
    parsed = client.responses.parse(input="The capital of France, as JSON.", text_format=Capital, **asked)
    assert parsed.output_parsed == Capital(city="Paris")
    schema = {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
        "additionalProperties": False,
    }  # fmt: skip
    tool = {"type": "function", "name": "weather", "parameters": schema, "strict": True}
    called = client.responses.create(input="Weather in Paris?", tools=[tool], tool_choice="required", **asked)
    (call,) = called.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Paris"})


def test_a_response_in_the_background_is_followed_from_where_its_stream_broke_off(client, running):
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 40, "input": LONG[0]["content"]}
    whole = client.responses.create(**asked)
    text, last, id = "", -1, ""
    with client.responses.create(background=True, stream=True, **asked) as stream:
        for event in stream:
            id, last = (getattr(event, "response", None) and event.response.id) or id, event.sequence_number
            if event.type == "response.output_text.delta":
                text += event.delta
                break
    kinds = []
    for event in client.responses.retrieve(id, stream=True, starting_after=last):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert (text, kinds[-1]) == (whole.output_text, f"response.{whole.status}")
    assert client.responses.retrieve(id).output_text == text
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        client.responses.cancel(whole.id)


def test_a_cancelled_response_leaves_the_engine(client, running):
    made = client.responses.create(model=MODEL, input=LONG[0]["content"], max_output_tokens=2000, background=True)
    assert made.status == "queued"
    while client.responses.retrieve(made.id).status != "in_progress" or not running.rows:
        time.sleep(0.02)
    assert client.responses.cancel(made.id).status == "cancelled"
    assert running.settle()
    assert client.responses.retrieve(made.id).status == "cancelled"


def test_an_app_responds_with_its_sources_and_reads_what_it_continues(client, fits):
    asked = {"model": "app:handbook", "max_output_tokens": 40}
    first = client.responses.create(input="Who keeps the key of the archive?", **asked)
    fits("Response", json.loads(first.to_json()))
    assert "Abendroth" in first.output_text
    assert first.model_extra["sources"][0]["source"].endswith("handbook.md")
    second = client.responses.create(input="And on which floor?", previous_response_id=first.id, **asked)
    assert "second" in second.output_text
    with client.responses.stream(input="Who keeps the key of the archive?", **asked) as stream:
        list(stream)
        assert stream.get_final_response().output_text == first.output_text
