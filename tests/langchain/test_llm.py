"""The contract of a plain language model, for which langchain-tests has no class."""

import asyncio
import time

import pytest
from langchain_core.caches import InMemoryCache

from calpaca import CalpacaLLM
from calpaca.core.engine import Grammar, Sampling
from calpaca.core.errors import AnswerTimeoutError, ContextOverflowError, ModelError, UnsupportedError, UsageError
from calpaca.testing import fake_model, fake_runtime

TEXT = "one two three four"


def llm_on(answers=None, *, engine=None, **arguments):
    runtime = fake_runtime(answers, **(engine or {}))
    return CalpacaLLM(runtime=runtime, **arguments), runtime.model().engine


def long_answer(prompt):
    return "word " * 2000


# Answers -----------------------------------------------------------------------------------------------------------


def test_stream_equals_invoke():
    llm, _ = llm_on([TEXT])
    pieces = list(llm.stream("?"))
    assert "".join(pieces) == llm.invoke("?") == TEXT
    assert len(pieces) > 2


async def test_async_equals_sync():
    llm, _ = llm_on([TEXT])
    assert await llm.ainvoke("?") == TEXT
    assert "".join([piece async for piece in llm.astream("?")]) == TEXT
    assert await llm.abatch(["a", "b"]) == [TEXT, TEXT]


def test_the_prompt_goes_to_the_model_as_it_stands():
    llm, engine = llm_on([TEXT])
    llm.invoke("A llama is")
    assert engine.prompts == ["A llama is"]


@pytest.mark.parametrize("ask", [lambda llm, **k: llm.invoke("?", **k), lambda llm, **k: "".join(llm.stream("?", **k))])
def test_stop_texts_are_cut_off(ask):
    llm, _ = llm_on([TEXT], stop="three")
    assert ask(llm) == "one two "
    assert ask(llm, stop=["two"]) == "one "
    assert ask(llm, stop=[]) == TEXT


def test_an_answer_may_be_empty():
    llm, _ = llm_on([TEXT])
    assert llm.invoke("?", stop=["one"]) == ""
    assert "".join(llm.stream("?", stop=["one"])) == ""


def test_a_result_says_why_it_ended_and_what_it_took():
    llm, _ = llm_on([TEXT], top_logprobs=2)
    result = llm.generate(["ab", "abc"], stop=["three"])
    info = result.generations[0][0].generation_info
    assert (info["finish_reason"], info["stop_reason"], info["model_name"]) == ("stop", "three", "fake")
    assert len(info["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert result.llm_output["token_usage"]["input_tokens"] == 5


def test_a_grammar_binds_the_answer():
    llm, _ = llm_on()
    assert llm.invoke("?", grammar=Grammar("regex", "(yes|no)!")) in {"yes!", "no!"}


# Arguments ---------------------------------------------------------------------------------------------------------


def test_arguments_of_a_call_come_before_those_of_the_constructor_and_the_settings(monkeypatch):
    monkeypatch.setenv("CALPACA_SAMPLING__TOP_K", "7")
    llm, engine = llm_on([TEXT], temperature=0.5, max_tokens=9)
    llm.invoke("?", temperature=0.25, seed=3, stop=["x"])
    assert engine.requests[-1].sampling == Sampling(9, 0.25, top_k=7, seed=3, stop=("x",))
    for name in ("max_tokens", "max_new_tokens"):
        llm.invoke("?", **{name: 3})
        list(llm.stream("?", **{name: 3}))
        assert [request.sampling.max_new_tokens for request in engine.requests[-2:]] == [3, 3]


def test_unknown_arguments_are_refused_with_the_nearest_name():
    llm, engine = llm_on([TEXT])
    for ask in (llm.invoke, lambda *a, **k: list(llm.stream(*a, **k)), lambda p, **k: llm.batch([p], **k)):
        with pytest.raises(UsageError, match="Did you mean 'temperature'"):
            ask("?", temprature=1)
    with pytest.raises(UsageError, match="Did you mean 'repetition_penalty'"):
        CalpacaLLM(runtime=fake_runtime(), repetition_penality=1.1)
    assert engine.requests == []


def test_penalties_min_p_and_bias_are_taken_per_call_and_at_construction():
    llm, engine = llm_on([TEXT], min_p=0.2, logit_bias={7: -100.0})
    llm.invoke("?")
    llm.invoke("?", frequency_penalty=0.5, presence_penalty=-0.5, min_p=0.1, logit_bias={8: 5})
    first, second = (request.sampling for request in engine.requests)
    assert (first.min_p, first.logit_bias, first.frequency_penalty) == (0.2, ((7, -100.0),), 0.0)
    assert (second.min_p, second.logit_bias) == (0.1, ((8, 5.0),))
    assert (second.frequency_penalty, second.presence_penalty) == (0.5, -0.5)
    with pytest.raises(UsageError, match="vocabulary"):
        llm.invoke("?", logit_bias={999: 1.0})


def test_a_method_that_no_engine_offers_is_refused_by_its_name():
    llm, engine = llm_on([TEXT])
    with pytest.raises(UnsupportedError, match="beam search"):
        llm.invoke("?", num_beams=4)
    with pytest.raises(UnsupportedError, match="guidance"):
        CalpacaLLM(runtime=fake_runtime(), guidance_scale=1.5)
    assert engine.requests == []


def test_wrong_names_and_values_fail_at_construction():
    for arguments, words in (
        ({"model": "smollm2-135m-instruc"}, "Did you mean 'smollm2-135m-instruct'"),
        ({"model": "./no/such/folder"}, "does not exist"),
        ({"engine": "transformer"}, "Did you mean 'transformers'"),
        ({"chat_template": "lama2-zh"}, "Did you mean 'llama2-zh'"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ):
        with pytest.raises((ModelError, UsageError), match=words):
            CalpacaLLM(**arguments)


def test_a_loaded_model_can_be_given():
    llm = CalpacaLLM.from_model(fake_model([TEXT]), Sampling(max_new_tokens=3, temperature=0.5))
    assert llm.invoke("?") == "one"
    assert (llm.temperature, llm.max_tokens) == (0.5, 3)
    with pytest.raises(UsageError, match="'fake' only"):
        llm.invoke("?", model="another")


# Many at once ------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_same_as_one_by_one_and_runs_at_once():
    llm, engine = llm_on(lambda prompt: prompt * 3, engine={"delay": 0.01})
    prompts = ["a ", "bb ", "ccc ", "d ", "e ", "f ", "g ", "h "]
    assert llm.batch(prompts) == [prompt * 3 for prompt in prompts]
    assert engine.peak == len(prompts)
    assert [llm.invoke(prompt) for prompt in prompts] == [prompt * 3 for prompt in prompts]


def test_max_concurrency_is_kept():
    llm, engine = llm_on([TEXT], engine={"delay": 0.005})
    llm.batch(["a"] * 6, {"max_concurrency": 2})
    assert engine.peak == 2


async def test_an_async_batch_runs_at_once():
    llm, engine = llm_on([TEXT], engine={"delay": 0.01})
    await llm.abatch(["a"] * 8)
    assert engine.peak == 8


async def test_return_exceptions_spares_the_others():
    llm, _ = llm_on([TEXT], engine={"context_length": 100})
    for results in (
        llm.batch(["a", "b" * 200], return_exceptions=True),
        await llm.abatch(["a", "b" * 200], return_exceptions=True),
    ):
        assert results[0] == TEXT
        assert isinstance(results[1], ContextOverflowError)


def test_when_one_prompt_is_refused_none_runs_on():
    llm, engine = llm_on(long_answer, engine={"context_length": 100, "delay": 0.01})
    with pytest.raises(ContextOverflowError, match="100"):
        llm.batch(["a", "b" * 200])
    time.sleep(0.05)
    assert engine.running == 0


# The cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"temperature": 1.0}, {"max_tokens": 3}, {"seed": 2}, {"stop": ["two"]}, {"grammar": Grammar("regex", "one")}],
)
def test_the_cache_tells_arguments_of_a_call_apart(arguments):
    llm, engine = llm_on([TEXT], cache=InMemoryCache())
    llm.invoke("?")
    llm.invoke("?", **arguments)
    llm.bind(**arguments).invoke("?")
    llm.invoke("?")
    assert len(engine.requests) == 2


async def test_the_cache_works_for_async_calls_too():
    llm, engine = llm_on([TEXT], cache=InMemoryCache())
    for arguments in ({}, {"temperature": 1.0}, {}):
        await llm.ainvoke("?", **arguments)
    assert len(engine.requests) == 2


def test_models_of_different_contents_share_no_cache():
    cache = InMemoryCache()
    first, second = fake_model(["first"]), fake_model(["second"])
    second.name = "other"
    assert [CalpacaLLM.from_model(model, cache=cache).invoke("?") for model in (first, second)] == ["first", "second"]


def test_the_identity_holds_contents_and_all_sampling():
    llm, _ = llm_on(temperature=0.5)
    identity = llm._identifying_params
    assert {"fingerprint", "adapters", "dtype", "quantization", "top_p", "top_k", "seed", "stop"} <= set(identity)
    assert identity["temperature"] == 0.5


# Callbacks ---------------------------------------------------------------------------------------------------------


def test_callbacks_hear_every_piece_once(recorder):
    llm, _ = llm_on([TEXT])
    pieces = list(llm.stream("?", {"callbacks": [recorder]}))
    assert recorder.tokens == [piece for piece in pieces if piece]
    assert recorder.events == ["start", "end"]


async def test_async_callbacks_hear_every_piece_once(recorder):
    llm, _ = llm_on([TEXT])
    pieces = [piece async for piece in llm.astream("?", {"callbacks": [recorder]})]
    assert recorder.tokens == [piece for piece in pieces if piece]
    assert recorder.events == ["start", "end"]


async def test_invoke_reports_pieces_when_it_is_told_to_stream(recorder):
    llm, _ = llm_on([TEXT], streaming=True)
    assert llm.invoke("?", {"callbacks": [recorder]}) == TEXT
    assert "".join(recorder.tokens) == TEXT
    assert await llm.ainvoke("?", {"callbacks": [recorder]}) == TEXT
    assert "".join(recorder.tokens) == TEXT * 2


def test_each_prompt_of_a_batch_starts_and_ends_once(recorder):
    llm, _ = llm_on([TEXT])
    llm.batch(["a", "b", "c"], {"callbacks": [recorder]})
    assert sorted(recorder.events) == ["end"] * 3 + ["start"] * 3


def test_an_error_is_reported_and_raised(recorder):
    llm, _ = llm_on([ModelError("no memory")])
    with pytest.raises(ModelError, match="no memory"):
        llm.invoke("?", {"callbacks": [recorder]})
    with pytest.raises(ModelError, match="no memory"):
        list(llm.stream("?", {"callbacks": [recorder]}))
    assert recorder.events == ["start", "ModelError"] * 2


# Leaving early -----------------------------------------------------------------------------------------------------


def settled(engine):
    deadline = time.monotonic() + 5
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.005)
    return engine.running == 0


def test_closing_a_stream_stops_the_engine(recorder):
    llm, engine = llm_on(long_answer, engine={"delay": 0.005})
    stream = llm.stream("?", {"callbacks": [recorder]})
    next(stream)
    stream.close()
    assert settled(engine)
    assert recorder.events == ["start", "GeneratorExit"]


async def test_closing_an_async_stream_stops_the_engine():
    llm, engine = llm_on(long_answer, engine={"delay": 0.005})
    stream = llm.astream("?")
    await anext(stream)
    await stream.aclose()
    assert settled(engine)


async def test_cancelling_a_task_stops_the_engine():
    llm, engine = llm_on(long_answer, engine={"delay": 0.005})
    task = asyncio.create_task(llm.abatch(["a", "b"]))
    while engine.running < 2:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert settled(engine)


async def test_an_answer_that_takes_too_long_is_cancelled():
    llm, engine = llm_on(long_answer, engine={"delay": 0.005}, timeout=0.05)
    for ask in (lambda: llm.invoke("?"), lambda: list(llm.stream("?"))):
        with pytest.raises(AnswerTimeoutError, match=r"0\.05 s"):
            ask()
    with pytest.raises(TimeoutError):
        await llm.ainvoke("?", timeout=0.02)
    assert settled(engine)


# Tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_by_the_model_s_own_tokenizer():
    llm, _ = llm_on()
    assert llm.get_token_ids("a你") == [97, 228, 189, 160]
    assert llm.get_num_tokens("a你") == 4
    assert CalpacaLLM(runtime=llm.runtime, custom_get_token_ids=lambda text: [1]).get_num_tokens("abc") == 1
