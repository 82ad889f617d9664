"""ChatCalpaca beyond langchain-tests: messages, arguments, the cache, batches, streams left early."""

import asyncio
import time

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from calpaca import ChatCalpaca, ModelSpec
from calpaca.core.engine import Grammar, Sampling
from calpaca.core.errors import AnswerTimeoutError, ContextOverflowError, ModelError, UnsupportedError, UsageError
from calpaca.testing import fake_model, fake_runtime

TEXT = "one two three four"


def chat_on(answers=None, *, engine=None, **arguments):
    runtime = fake_runtime(answers, **(engine or {}))
    return ChatCalpaca(runtime=runtime, **arguments), runtime.model().engine


def long_answer(prompt):
    return "word " * 2000


def settled(engine):
    deadline = time.monotonic() + 5
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.005)
    return engine.running == 0


def merged(chunks):
    first, *rest = chunks
    return first + rest


# Messages ----------------------------------------------------------------------------------------------------------


def prompt_of(messages, **arguments):
    chat, engine = chat_on([TEXT])
    chat.invoke(messages, **arguments)
    return engine.prompts[0]


def test_messages_are_rendered_by_the_chat_template():
    assert prompt_of([SystemMessage("Be brief."), HumanMessage("Hi", name="Ana")]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_runs_of_a_role_are_merged_and_system_messages_come_first():
    messages = [HumanMessage("a"), HumanMessage("b"), SystemMessage("s"), AIMessage("c"), AIMessage("d")]
    assert prompt_of(messages) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na\n\nb<|im_end|>\n"
        "<|im_start|>assistant\nc\n\nd<|im_end|>\n<|im_start|>assistant\n"
    )


def test_blocks_become_text():
    blocks = [
        "x",
        {"type": "text", "text": "y"},
        {"type": "text-plain", "text": "z"},
        {"type": "refusal", "refusal": "no"},
    ]
    assert "user\nx\ny\nz\nno<|im_end|>" in prompt_of([HumanMessage(blocks)])
    earlier = AIMessage([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}])
    assert "assistant\nyes<|im_end|>" in prompt_of([HumanMessage("?"), earlier])


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "images"),
        ({"type": "audio", "base64": "x", "mime_type": "audio/wav"}, "audio"),
        ({"type": "file", "base64": "x", "mime_type": "application/pdf"}, "files"),
        ({"type": "hologram"}, "hologram"),
        ({}, "empty block"),
    ],
)
def test_what_is_no_text_is_refused_by_name(block, named):
    with pytest.raises(UnsupportedError, match=named):
        prompt_of([HumanMessage([block])])


def test_tool_messages_become_text_where_the_template_knows_none():
    call = {"name": "add", "args": {"a": 1}, "id": "1", "type": "tool_call"}
    prompt = prompt_of([HumanMessage("?"), AIMessage("", tool_calls=[call]), ToolMessage("3", tool_call_id="1")])
    assert 'assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in prompt
    assert "user\n<tool_response>\n3\n</tool_response><|im_end|>" in prompt


def test_roles_by_name_are_known_or_refused():
    assert "<|im_start|>system\ns<|im_end|>" in prompt_of([ChatMessage("s", role="developer"), HumanMessage("?")])
    with pytest.raises(UsageError, match="Did you mean 'assistant'"):
        prompt_of([ChatMessage("s", role="asistant")])
    with pytest.raises(UnsupportedError, match="remove"):
        prompt_of([RemoveMessage(id="1")])


# Answers -----------------------------------------------------------------------------------------------------------


async def test_all_ways_to_ask_give_the_same():
    chat, _ = chat_on([TEXT])
    streamed = merged(list(chat.stream("?")))
    astreamed = merged([chunk async for chunk in chat.astream("?")])
    answers = [chat.invoke("?"), await chat.ainvoke("?"), streamed, astreamed]
    assert {answer.text for answer in answers} == {TEXT}
    for answer in answers:
        assert answer.usage_metadata["output_tokens"] == len(TEXT) + 0
        assert answer.response_metadata["finish_reason"] == "stop"
        assert answer.response_metadata["model_name"] == "fake"


def test_logprobs_line_up_with_the_text_streamed_or_not():
    chat, _ = chat_on([TEXT], logprobs=True)
    for answer in (chat.invoke("?"), merged(list(chat.stream("?")))):
        entries = answer.response_metadata["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == TEXT
    entries = chat.invoke("?", top_logprobs=2).response_metadata["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert "logprobs" not in chat.invoke("?", logprobs=False).response_metadata


def test_an_answer_that_stops_at_once_still_streams_its_end():
    chat, _ = chat_on([TEXT])
    (chunk,) = chat.stream("?", stop=["one"])
    assert (chunk.content, chunk.chunk_position) == ("", "last")
    assert chunk.response_metadata["stop_reason"] == "one"
    assert chat.invoke("?", stop=["one"]).content == ""


def test_a_cut_answer_says_so():
    chat, _ = chat_on([TEXT], max_tokens=3)
    assert chat.invoke("?").response_metadata["finish_reason"] == "length"


def test_callbacks_hear_every_chunk_once(recorder):
    chat, _ = chat_on([TEXT])
    chunks = list(chat.stream("?", {"callbacks": [recorder]}))
    assert recorder.tokens == [chunk.content for chunk in chunks]
    assert recorder.events == ["start", "end"]


def test_invoke_streams_when_it_is_told_to(recorder):
    chat, _ = chat_on([TEXT], streaming=True)
    assert chat.invoke("?", {"callbacks": [recorder]}).content == TEXT
    assert len(recorder.tokens) > 2


# Arguments ---------------------------------------------------------------------------------------------------------


def test_arguments_of_a_call_come_first():
    chat, engine = chat_on([TEXT], temperature=0.5, max_new_tokens=9, stop=["x"])
    chat.invoke("?", temperature=0.25, seed=3)
    assert engine.requests[-1].sampling == Sampling(9, 0.25, seed=3, stop=("x", "<|im_end|>"))
    list(chat.stream("?", max_tokens=5, stop=["y"]))
    assert engine.requests[-1].sampling == Sampling(5, 0.5, stop=("y", "<|im_end|>"))


async def test_unknown_arguments_of_a_call_are_refused_with_the_nearest_name():
    chat, engine = chat_on([TEXT])
    with pytest.raises(UsageError, match="Did you mean 'temperature'"):
        chat.invoke("?", temprature=1)
    with pytest.raises(UsageError, match="Did you mean 'tool_choice'"):
        await chat.ainvoke("?", tool_choise="any")
    assert engine.requests == []


def test_a_spec_sets_the_fields():
    spec = ModelSpec(model="fake", adapters=("a", "b@0.5"), dtype="float32")
    chat = ChatCalpaca(model=spec, runtime=fake_runtime())
    assert (chat.model, chat.adapters, chat.dtype) == ("fake", ("a", "b@0.5"), "float32")
    assert chat.spec == spec


def test_another_model_can_be_asked_per_call_without_the_first_one_s_adapters():
    asked = []

    class Runtime(type(fake_runtime())):
        def model(self, model=None):
            asked.append(model)
            return super().model(model)

    runtime = Runtime(fake_model([TEXT]), None, fake_runtime().settings)
    ChatCalpaca(model="fake", adapters=["a"], dtype="float32", runtime=runtime).invoke("?", model="other")
    assert ModelSpec(model="other", dtype="float32") in asked


def test_construction_loads_nothing():
    class Runtime(type(fake_runtime())):
        def model(self, model=None):
            raise AssertionError("loaded")

    runtime = Runtime(fake_model(), None, fake_runtime().settings)
    chat = ChatCalpaca(runtime=runtime, temperature=0.5, max_tokens=5, stop=["x"])
    params = chat._get_ls_params(stop=["y"], temperature=0.7)
    assert (params["ls_temperature"], params["ls_max_tokens"], params["ls_stop"]) == (0.7, 5, ["y"])
    assert params["ls_provider"] == "calpaca"
    assert len(repr(chat)) < 500


def test_a_loaded_model_can_be_given():
    chat = ChatCalpaca.from_model(fake_model([TEXT], context_length=999), Sampling(max_new_tokens=3))
    assert chat.invoke("?").content == "one"
    assert chat.profile["max_input_tokens"] == 999


def test_the_profile_knows_the_context_length_before_loading(smollm2):
    for model in ("smollm2-135m-instruct", str(smollm2)):
        profile = ChatCalpaca(model=model).profile
        assert profile["max_input_tokens"] == 8192
        assert profile["tool_calling"] and profile["structured_output"]


def test_versions_are_traced():
    chat, _ = chat_on()
    assert {"calpaca", "langchain-core"} <= set(chat.metadata["lc_versions"])


def test_a_model_that_could_not_be_fetched_is_tried_again(monkeypatch):
    from calpaca.core.errors import DownloadError

    failures = [DownloadError("no network"), DownloadError("no network")]

    class Runtime(type(fake_runtime())):
        def model(self, model=None):
            if failures:
                raise failures.pop()
            return super().model(model)

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    runtime = Runtime(fake_model([TEXT]), None, fake_runtime().settings)
    with pytest.raises(DownloadError):
        ChatCalpaca(runtime=runtime).invoke("?")
    assert ChatCalpaca(runtime=runtime, max_retries=1).invoke("?").content == TEXT


# The cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 1.0},
        {"max_tokens": 3},
        {"stop": ["two"]},
        {"grammar": Grammar("regex", "one")},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    ],
)
def test_the_cache_tells_arguments_of_a_call_apart(arguments):
    chat, engine = chat_on([TEXT], cache=InMemoryCache())
    for each in ({}, arguments, {}, arguments):
        chat.invoke("?", **each)
    assert len(engine.requests) == 2


def test_models_of_different_contents_share_no_cache():
    cache = InMemoryCache()
    first, second = fake_model(["first"]), fake_model(["second"])
    second.name = "other"
    answers = [ChatCalpaca.from_model(model, cache=cache).invoke("?").content for model in (first, second)]
    assert answers == ["first", "second"]


# Many at once ------------------------------------------------------------------------------------------------------


async def test_batches_run_at_once_and_give_what_single_calls_give():
    chat, engine = chat_on(lambda prompt: prompt[-60:-30], engine={"delay": 0.02, "slots": 16})
    questions = [f"question number {index} of many" for index in range(12)]
    answers = [answer.content for answer in chat.batch(questions)]
    assert engine.peak == len(questions)
    assert [answer.content for answer in await chat.abatch(questions)] == answers
    assert [chat.invoke(question).content for question in questions] == answers


def test_max_concurrency_and_callbacks_are_kept(recorder):
    chat, engine = chat_on([TEXT], engine={"delay": 0.005})
    chat.batch(["a"] * 6, {"max_concurrency": 2, "callbacks": [recorder]})
    assert engine.peak <= 2
    assert sorted(recorder.events) == ["end"] * 6 + ["start"] * 6


def test_the_caller_s_config_is_not_changed():
    chat, _ = chat_on([TEXT])
    config = {"tags": ["x"]}
    chat.batch(["a", "b"], config)
    assert config == {"tags": ["x"]}
    configs = [{"tags": ["x"]}, {"tags": ["y"]}]
    chat.batch(["a", "b"], configs)
    assert configs == [{"tags": ["x"]}, {"tags": ["y"]}]


def test_return_exceptions_spares_the_others():
    chat, _ = chat_on([TEXT], engine={"context_length": 200})
    good, bad = chat.batch(["a", "b" * 300], return_exceptions=True)
    assert good.content == TEXT
    assert isinstance(bad, ContextOverflowError)


def test_an_empty_batch_is_empty():
    assert chat_on()[0].batch([]) == []


# Leaving early -----------------------------------------------------------------------------------------------------


async def test_leaving_a_stream_stops_the_engine(recorder):
    chat, engine = chat_on(long_answer, engine={"delay": 0.005})
    stream = chat.stream("?", {"callbacks": [recorder]})
    next(stream)
    stream.close()
    assert settled(engine)
    assert recorder.events == ["start", "GeneratorExit"]
    astream = chat.astream("?")
    await anext(astream)
    await astream.aclose()
    assert settled(engine)


async def test_cancelling_a_task_stops_the_engine():
    chat, engine = chat_on(long_answer, engine={"delay": 0.005})
    task = asyncio.create_task(chat.ainvoke("?"))
    while not engine.running:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert settled(engine)


def test_an_answer_that_takes_too_long_is_cancelled():
    chat, engine = chat_on(long_answer, engine={"delay": 0.005}, timeout=0.05)
    with pytest.raises(AnswerTimeoutError, match=r"0\.05 s"):
        chat.invoke("?")
    with pytest.raises(AnswerTimeoutError):
        list(chat.stream("?"))
    assert settled(engine)


def test_an_engine_s_error_is_raised_and_reported(recorder):
    chat, _ = chat_on([ModelError("no memory")])
    with pytest.raises(ModelError, match="no memory"):
        list(chat.stream("?", {"callbacks": [recorder]}))
    assert recorder.events == ["start", "ModelError"]


# Tokens ------------------------------------------------------------------------------------------------------------


def test_messages_are_counted_as_the_template_renders_them():
    chat, _ = chat_on([TEXT])
    messages = [SystemMessage("s"), HumanMessage("你")]
    assert chat.get_num_tokens_from_messages(messages) == chat.invoke(messages).usage_metadata["input_tokens"]

    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    asked = chat.bind_tools([add]).invoke(messages)
    assert chat.get_num_tokens_from_messages(messages, tools=[add]) == asked.usage_metadata["input_tokens"]
    assert chat.get_num_tokens("你") == 3


# More than the context holds -----------------------------------------------------------------------------------------

LONG_TALK = [
    SystemMessage("Be brief."),
    HumanMessage("first " * 30),
    AIMessage("second " * 30),
    HumanMessage("third"),
]


def test_what_was_sent_is_in_the_response():
    chat, engine = chat_on([TEXT])
    answer = chat.invoke("Hi", max_tokens=20)
    use = answer.response_metadata["context"]
    assert use["policy"] == "error"
    assert use["sent_tokens"] == answer.usage_metadata["input_tokens"] == len(engine.prompts[0].encode())
    assert (use["dropped"], use["answer_tokens"]) == (0, 20)


def test_a_conversation_that_is_too_long_is_an_error_unless_a_policy_says_otherwise():
    chat, engine = chat_on([TEXT], engine={"context_length": 200})
    with pytest.raises(ContextOverflowError):
        chat.invoke(LONG_TALK, max_tokens=20)
    answer = chat.invoke(LONG_TALK, max_tokens=20, context_policy="drop")
    assert "first" not in engine.prompts[-1] and "Be brief." in engine.prompts[-1] and "third" in engine.prompts[-1]
    use = answer.response_metadata["context"]
    assert (use["policy"], use["dropped"], use["unit"]) == ("drop", 2, "message")
    assert use["sent_tokens"] == answer.usage_metadata["input_tokens"]


async def test_the_summary_of_what_was_left_out_is_in_the_response_on_every_way():
    chat, engine = chat_on(
        ["They counted."], engine={"context_length": 1000}, context_policy="summarise", max_tokens=600
    )
    answers = [chat.invoke(LONG_TALK), await chat.ainvoke(LONG_TALK), merged(chat.stream(LONG_TALK))]
    answers.append(merged([chunk async for chunk in chat.astream(LONG_TALK)]))
    for answer in answers:
        assert answer.response_metadata["context"]["summary"] == "They counted."
    assert len(engine.prompts) == 8
    assert "Earlier in this conversation:\nThey counted." in engine.prompts[-1]


def test_an_unknown_policy_is_refused_at_construction_and_at_the_call():
    with pytest.raises(UsageError, match="Unknown context policy 'trim'"):
        chat_on(context_policy="trim")
    chat, _ = chat_on([TEXT])
    with pytest.raises(UsageError, match="'refine' is not for this"):
        chat.invoke("Hi", context_policy="refine")


def test_another_policy_is_another_cache_entry():
    chat, _ = chat_on([TEXT])
    assert chat._get_llm_string() != chat._get_llm_string(context_policy="drop")
    assert chat._get_llm_string(context_policy="drop") == chat.model_copy(
        update={"context_policy": "drop"}
    )._get_llm_string(context_policy="drop")
