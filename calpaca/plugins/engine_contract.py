"""What every engine must do, as a test class: subclass it, and override the fixture `engine`.

    class TestMyEngine(EngineContract):
        @pytest.fixture(scope="class")
        @classmethod
        def engine(cls):
            engine = MyEngine(...)
            yield engine
            engine.close()

The model does not matter, as long as it is run in float32 and does not end an answer within its first dozen tokens.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from calpaca.core.engine import (
    Completion,
    Conversation,
    ConversationEngine,
    Engine,
    Grammar,
    Handle,
    Request,
    Sampling,
    TokenLogprob,
)
from calpaca.core.errors import CalpacaError, ContextOverflowError, UnsupportedError

PROMPTS = (
    "Once upon a time there was a llama",
    "1 2 3 4 5",
    "The capital of France is a city that many people visit every year because of its",
    "Water",
    "从前有一座山，山里有一座庙",
)
PATIENCE = 120.0
"""Seconds after which a request counts as stuck."""


class EngineContract:
    """One contract for all engines. A test is skipped only where `capabilities()` do not claim what it checks."""

    @pytest.fixture
    def engine(self) -> Engine:
        raise NotImplementedError("override the fixture `engine`")

    # Answers -------------------------------------------------------------------------------------------------------
    def test_the_engine_fits_the_protocol(self, engine: Engine) -> None:
        assert isinstance(engine, Engine)
        length = engine.capabilities().context_length
        assert length is None or length > 0

    def test_greedy_answers_repeat(self, engine: Engine) -> None:
        first, second = (_answer(engine, PROMPTS[0]) for _ in range(2))
        assert first.text == second.text != ""
        assert first.token_ids == second.token_ids

    def test_token_ids_as_prompt_are_the_same_as_their_text(self, engine: Engine) -> None:
        _needs(engine.capabilities().token_ids, "token ids")
        ids = tuple(engine.encode(PROMPTS[0]))
        assert _answer(engine, ids).text == _answer(engine, PROMPTS[0]).text

    def test_text_survives_encoding(self, engine: Engine) -> None:
        _needs(engine.capabilities().token_ids, "token ids")
        for text in (*PROMPTS, "你好，世界 🦙 ok?"):
            assert engine.decode(engine.encode(text)) == text
            assert engine.decode(engine.encode((text[:2], text[2:]))) == text

    def test_max_new_tokens_ends_an_answer(self, engine: Engine) -> None:
        for length in (1, 5):
            answer = _answer(engine, PROMPTS[0], max_new_tokens=length)
            assert answer.finish_reason == "length"
            assert answer.usage.completion_tokens == length

    def test_usage_and_timings_come_with_the_last_chunk(self, engine: Engine) -> None:
        *chunks, last = engine.submit(Request(PROMPTS[0], Sampling(max_new_tokens=6)))
        assert all(chunk.finish_reason is None and chunk.usage is None for chunk in chunks)
        assert last.usage is not None and last.timings is not None
        if engine.capabilities().token_ids:
            assert last.usage.prompt_tokens == len(engine.encode(PROMPTS[0]))
        assert 0 <= last.timings.first_token <= last.timings.total

    def test_an_answer_streams(self, engine: Engine) -> None:
        chunks = list(engine.submit(Request(PROMPTS[0], Sampling(max_new_tokens=12))))
        assert len([chunk for chunk in chunks if chunk.text]) > 1
        assert "".join(chunk.text for chunk in chunks) == _answer(engine, PROMPTS[0]).text

    def test_top_k_1_and_a_tiny_top_p_are_greedy(self, engine: Engine) -> None:
        greedy = _answer(engine, PROMPTS[0]).text
        if "top_k" not in engine.capabilities().unsupported:
            assert _answer(engine, PROMPTS[0], temperature=1.0, top_k=1).text == greedy
        assert _answer(engine, PROMPTS[0], temperature=1.0, top_p=1e-6).text == greedy

    # Stop texts ----------------------------------------------------------------------------------------------------
    def test_a_stop_text_is_cut_and_never_leaks(self, engine: Engine) -> None:
        whole = _answer(engine, PROMPTS[0], max_new_tokens=24).text
        middle = len(whole) // 2
        for stop in (whole[middle : middle + 5], whole[middle : middle + 2], whole[1:9]):
            expected = whole[: whole.index(stop)]
            handle = engine.submit(Request(PROMPTS[0], Sampling(max_new_tokens=24, stop=(stop,))))
            streamed = ""
            for chunk in handle:
                streamed += chunk.text
                assert expected.startswith(streamed)
            answer = handle.result()
            assert (streamed, answer.finish_reason) == (expected, "stop")
            assert answer.stop == stop or not (answer.stop or engine.capabilities().stop_texts)

    def test_the_first_stop_text_to_appear_wins(self, engine: Engine) -> None:
        whole = _answer(engine, PROMPTS[0], max_new_tokens=24).text
        early, late = whole[4:8], whole[-6:]
        answer = _answer(engine, PROMPTS[0], max_new_tokens=24, stop=(late, early))
        assert answer.text == whole[: min(whole.index(early), whole.index(late))]

    def test_a_stop_text_that_is_never_completed_changes_nothing(self, engine: Engine) -> None:
        whole = _answer(engine, PROMPTS[0]).text
        for stop in (whole[-3:] + "\x00", whole[2:6] + "\x00"):
            assert _answer(engine, PROMPTS[0], stop=(stop,)).text == whole

    def test_an_answer_may_be_empty(self, engine: Engine) -> None:
        first = _answer(engine, PROMPTS[0]).text[0]
        handle = engine.submit(Request(PROMPTS[0], Sampling(max_new_tokens=12, stop=(first,))))
        assert "".join(chunk.text for chunk in handle) == ""
        assert handle.result().finish_reason == "stop"

    # Batches and threads -------------------------------------------------------------------------------------------
    def test_a_batch_of_different_lengths_is_the_same_as_one_by_one(self, engine: Engine) -> None:
        alone = [_answer(engine, prompt, max_new_tokens=4 + 3 * index).text for index, prompt in enumerate(PROMPTS)]
        handles = [
            engine.submit(Request(prompt, Sampling(max_new_tokens=4 + 3 * index)))
            for index, prompt in enumerate(PROMPTS)
        ]
        assert [handle.result(PATIENCE).text for handle in handles] == alone

    def test_requests_of_many_threads_never_mix(self, engine: Engine) -> None:
        alone = {prompt: _answer(engine, prompt, max_new_tokens=8).text for prompt in PROMPTS}
        asked = list(PROMPTS) * 2
        with ThreadPoolExecutor(len(asked)) as threads:
            answers = list(threads.map(lambda prompt: _answer(engine, prompt, max_new_tokens=8).text, asked))
        assert answers == [alone[prompt] for prompt in asked]

    def test_a_request_keeps_its_own_settings_in_a_batch(self, engine: Engine) -> None:
        alone = _answer(engine, PROMPTS[0]).text
        seeds = range(3) if engine.capabilities().seed else [None] * 3
        hot = [engine.submit(Request(PROMPTS[1], Sampling(12, temperature=2.0, seed=seed))) for seed in seeds]
        assert _answer(engine, PROMPTS[0]).text == alone
        for handle in hot:
            handle.result(PATIENCE)

    def test_sync_and_async_are_the_same(self, engine: Engine) -> None:
        async def ask() -> tuple[str, list[str]]:
            streamed = ""
            async for chunk in engine.submit(_request(PROMPTS[0])):
                streamed += chunk.text
            answers = await asyncio.gather(*(_wait(engine.submit(_request(prompt))) for prompt in PROMPTS))
            return streamed, [answer.text for answer in answers]

        assert asyncio.run(ask()) == (
            _answer(engine, PROMPTS[0]).text,
            [_answer(engine, prompt).text for prompt in PROMPTS],
        )

    # Seeds ---------------------------------------------------------------------------------------------------------
    def test_a_seed_repeats_alone_and_in_company(self, engine: Engine) -> None:
        _needs(engine.capabilities().seed, "seeds")
        hot: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.5, "seed": 7}
        alone = _answer(engine, PROMPTS[0], **hot).text
        company = [engine.submit(Request(prompt, Sampling(20, temperature=1.0, seed=1))) for prompt in PROMPTS]
        assert _answer(engine, PROMPTS[0], **hot).text == alone
        for handle in company:
            handle.result(PATIENCE)

    def test_other_seeds_give_other_texts(self, engine: Engine) -> None:
        _needs(engine.capabilities().seed, "seeds")
        handles = [engine.submit(Request(PROMPTS[0], Sampling(12, temperature=1.5, seed=seed))) for seed in range(4)]
        assert len({handle.result(PATIENCE).text for handle in handles}) > 1

    # Log probabilities ---------------------------------------------------------------------------------------------
    def test_logprobs_have_one_entry_per_token_and_sum_to_at_most_1(self, engine: Engine) -> None:
        _needs(engine.capabilities().max_logprobs >= 3, "logprobs")
        answer = _answer(engine, PROMPTS[0], logprobs=3)
        assert len(answer.logprobs) == answer.usage.completion_tokens
        if engine.capabilities().token_ids:
            assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
        for entry in answer.logprobs:
            tops = [logprob for _, _, logprob in entry.top]
            assert len(tops) == 3 and tops == sorted(tops, reverse=True)
            assert entry.logprob <= 1e-6
            assert sum(math.exp(logprob) for logprob in tops) <= 1 + 1e-4
            # Greedy: nothing is likelier than what was chosen.
            assert entry.logprob == pytest.approx(tops[0], abs=1e-4)

    def test_logprobs_0_gives_the_chosen_tokens_only(self, engine: Engine) -> None:
        _needs(engine.capabilities().max_logprobs > 0, "logprobs")
        answer = _answer(engine, PROMPTS[0], max_new_tokens=4, logprobs=0)
        assert len(answer.logprobs) == 4
        assert all(entry.top == () for entry in answer.logprobs)

    # What a prompt's own tokens are worth ------------------------------------------------------------------------
    def test_a_prompt_is_scored_as_its_tokens_would_be_generated(self, engine: Engine) -> None:
        _needs(engine.capabilities().prompt_logprobs, "prompt_logprobs")
        ids = list(engine.encode(PROMPTS[0]))
        generated: list[TokenLogprob] = []
        for _ in range(3):
            answer = _answer(engine, tuple(ids), max_new_tokens=1, logprobs=1)
            ids += answer.token_ids
            generated += answer.logprobs
        scored = _score(engine, tuple(ids), alternatives=1)
        assert (scored.text, scored.finish_reason) == ("", "length")
        assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (len(ids), 0)
        first, *others = scored.prompt_logprobs
        assert first is None and [entry.token_id for entry in others if entry is not None] == ids[1:]
        for expected, entry in zip(generated, others[-3:], strict=True):
            assert entry is not None
            assert (entry.token_id, entry.text) == (expected.token_id, expected.text)
            assert entry.logprob == pytest.approx(expected.logprob, abs=1e-3)
            assert [token for token, _, _ in entry.top] == [expected.top[0][0]]

    def test_prompts_that_are_scored_together_are_scored_as_alone(self, engine: Engine) -> None:
        _needs(engine.capabilities().prompt_logprobs, "prompt_logprobs")
        alone = [_values(_score(engine, prompt)) for prompt in PROMPTS]
        handles = [engine.submit(_scoring(prompt)) for prompt in PROMPTS]
        company = [engine.submit(_request(prompt, max_new_tokens=20)) for prompt in PROMPTS]
        for handle, expected in zip(handles, alone, strict=True):
            assert _values(handle.result(PATIENCE)) == pytest.approx(expected, abs=1e-3)
        assert all(handle.result(PATIENCE).prompt_logprobs == () for handle in company)

    def test_a_scored_prompt_may_be_answered_too(self, engine: Engine) -> None:
        _needs(engine.capabilities().prompt_logprobs, "prompt_logprobs")
        first, *others = engine.submit(Request(PROMPTS[0], Sampling(max_new_tokens=6), prompt_logprobs=0))
        assert len(first.prompt_logprobs) == len(engine.encode(PROMPTS[0]))
        assert all(chunk.prompt_logprobs == () for chunk in others)
        text = "".join(chunk.text for chunk in (first, *others))
        assert text == _answer(engine, PROMPTS[0], max_new_tokens=6).text

    # Bias and penalties ------------------------------------------------------------------------------------------
    def test_a_bias_decides_what_is_said(self, engine: Engine) -> None:
        _needs("logit_bias" not in engine.capabilities().unsupported, "logit_bias")
        _needs(engine.capabilities().token_ids, "token ids")
        wanted, banned = engine.encode("b")[0], engine.encode(_answer(engine, PROMPTS[0], max_new_tokens=1).text)[0]
        forced = _answer(engine, PROMPTS[0], max_new_tokens=3, logit_bias=((wanted, 100.0),))
        assert forced.text == engine.decode([wanted]) * 3
        without = _answer(engine, PROMPTS[0], max_new_tokens=8, logit_bias=((banned, -100.0),))
        assert engine.decode([banned]) != without.text[: len(engine.decode([banned]))]

    def test_penalties_count_the_answer_only(self, engine: Engine) -> None:
        for name in ("frequency_penalty", "presence_penalty"):
            if name in engine.capabilities().unsupported:
                continue
            first = _answer(engine, PROMPTS[0], max_new_tokens=1)
            assert _answer(engine, PROMPTS[0], max_new_tokens=1, **{name: 2.0}).text == first.text
            repeated = _answer(engine, PROMPTS[1], max_new_tokens=24).text
            assert _answer(engine, PROMPTS[1], max_new_tokens=24, **{name: 2.0}).text != repeated
            assert _answer(engine, PROMPTS[1], max_new_tokens=24).text == repeated

    def test_min_p_1_is_greedy(self, engine: Engine) -> None:
        _needs("min_p" not in engine.capabilities().unsupported, "min_p")
        greedy = _answer(engine, PROMPTS[0]).text
        assert _answer(engine, PROMPTS[0], temperature=1.5, min_p=1.0, seed=3).text == greedy

    # Cancelling ----------------------------------------------------------------------------------------------------
    def test_cancelling_frees_the_slots(self, engine: Engine) -> None:
        handles = [_long(engine) for _ in range(12)]
        for handle in handles:
            handle.cancel()
            handle.cancel()
        assert {handle.result(PATIENCE).finish_reason for handle in handles} <= {"cancelled", "stop", "length"}
        assert _answer(engine, PROMPTS[1], max_new_tokens=2).usage.completion_tokens == 2

    def test_leaving_a_stream_cancels(self, engine: Engine) -> None:
        handle = _long(engine)
        stream = iter(handle)
        next(stream)
        stream.close()  # type: ignore[attr-defined]  # it is a generator
        _settle(lambda: handle.done)
        assert handle.result(0).finish_reason == "cancelled"

    def test_leaving_an_async_stream_cancels(self, engine: Engine) -> None:
        handle = _long(engine)

        async def leave() -> None:
            stream = aiter(handle)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]

        asyncio.run(leave())
        _settle(lambda: handle.done)
        assert handle.result(0).finish_reason == "cancelled"

    # Refusals ------------------------------------------------------------------------------------------------------
    def test_a_prompt_that_is_too_long_is_refused_with_numbers(self, engine: Engine) -> None:
        limit = _known_limit(engine)
        _needs(engine.capabilities().token_ids, "token ids")
        ids = (engine.encode("a long text ") * limit)[: limit + 3]
        with pytest.raises(ContextOverflowError, match=str(limit)) as caught:
            engine.submit(Request(tuple(ids), Sampling(max_new_tokens=5))).result(PATIENCE)
        assert (caught.value.prompt_tokens, caught.value.max_new_tokens) == (limit + 3, 5)

    def test_an_answer_that_does_not_fit_is_refused_with_numbers(self, engine: Engine) -> None:
        limit = _known_limit(engine)
        with pytest.raises(ContextOverflowError, match=str(limit)):
            engine.submit(Request(PROMPTS[0], Sampling(max_new_tokens=limit))).result(PATIENCE)

    def test_what_is_not_supported_is_refused_by_name(self, engine: Engine) -> None:
        can = engine.capabilities()
        asked = {
            "adapter": (not can.adapters, Request("a", adapter="none")),
            "regex": ("regex" not in can.grammars, Request("a", grammar=Grammar("regex", "a"))),
            "logprobs": (can.max_logprobs < 20, Request("a", Sampling(logprobs=20))),
            "seed": (not can.seed, Request("a", Sampling(seed=1))),
            "top_k": ("top_k" in can.unsupported, Request("a", Sampling(temperature=1.0, top_k=5))),
            "repetition_penalty": (
                "repetition_penalty" in can.unsupported,
                Request("a", Sampling(repetition_penalty=1.5)),
            ),
            "min_p": ("min_p" in can.unsupported, Request("a", Sampling(temperature=1.0, min_p=0.1))),
            "frequency_penalty": (
                "frequency_penalty" in can.unsupported,
                Request("a", Sampling(frequency_penalty=0.5)),
            ),
            "presence_penalty": ("presence_penalty" in can.unsupported, Request("a", Sampling(presence_penalty=0.5))),
            "logit_bias": ("logit_bias" in can.unsupported, Request("a", Sampling(logit_bias=((1, 1.0),)))),
            "prompt_logprobs": (not can.prompt_logprobs, Request("a", prompt_logprobs=0)),
            "token ids": (not can.token_ids, Request((1, 2))),
            "conversation": (
                not can.conversations,
                Request("", conversation=Conversation(({"role": "user", "content": "a"},))),
            ),
        }
        for field, (refused, request) in asked.items():
            if refused:
                with pytest.raises(UnsupportedError, match=field):
                    engine.submit(request)

    # Conversations -------------------------------------------------------------------------------------------------
    def test_a_conversation_is_answered_and_counted(self, engine: Engine) -> None:
        _needs(engine.capabilities().conversations, "conversations")
        assert isinstance(engine, ConversationEngine)
        asked = Conversation(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}))
        answer = engine.submit(Request("", Sampling(max_new_tokens=8), conversation=asked)).result(PATIENCE)
        again = engine.submit(Request("", Sampling(max_new_tokens=8), conversation=asked)).result(PATIENCE)
        assert answer.text == again.text != ""
        assert engine.count_tokens(asked) >= answer.usage.prompt_tokens > 0

    # Grammars ------------------------------------------------------------------------------------------------------
    def test_a_json_schema_gives_valid_json(self, engine: Engine) -> None:
        _needs("json_schema" in engine.capabilities().grammars, "JSON schemas")
        colours = ["red", "green", "蓝色"]
        schema = {
            "type": "object",
            "properties": {
                "colour": {"enum": colours},
                "legs": {"type": "integer", "minimum": 0, "maximum": 8},
                "names": {"type": "array", "items": {"enum": ["Ana", "李雷"]}, "minItems": 1, "maxItems": 2},
            },
            "required": ["colour", "legs", "names"],
            "additionalProperties": False,
        }
        for sampling in (Sampling(200), Sampling(200, temperature=1.0, seed=3)):
            answer = engine.submit(Request(PROMPTS[0], sampling, Grammar("json_schema", schema))).result(PATIENCE)
            value = json.loads(answer.text)
            assert answer.finish_reason == "stop"
            assert value["colour"] in colours and 0 <= value["legs"] <= 8 and 1 <= len(value["names"]) <= 2

    def test_a_grammar_binds_its_own_request_only(self, engine: Engine) -> None:
        _needs("regex" in engine.capabilities().grammars, "regular expressions")
        alone = _answer(engine, PROMPTS[0]).text
        bound = engine.submit(Request(PROMPTS[0], Sampling(32), Grammar("regex", "(yes|no)!")))
        assert _answer(engine, PROMPTS[0]).text == alone
        assert bound.result(PATIENCE).text in {"yes!", "no!"}

    def test_characters_split_over_tokens_come_out_whole(self, engine: Engine) -> None:
        _needs("regex" in engine.capabilities().grammars, "regular expressions")
        text = "你好，世界！🦙👩‍🚀龘é"
        chunks = list(engine.submit(Request("Hi", Sampling(200), Grammar("regex", text))))
        assert "".join(chunk.text for chunk in chunks) == text
        assert not any("\ufffd" in chunk.text for chunk in chunks)

    def test_a_grammar_that_cannot_be_read_is_an_error(self, engine: Engine) -> None:
        _needs("regex" in engine.capabilities().grammars, "regular expressions")
        with pytest.raises(CalpacaError):
            engine.submit(Request("Hi", Sampling(8), Grammar("regex", "(unclosed"))).result(PATIENCE)
        assert _answer(engine, PROMPTS[1], max_new_tokens=2).usage.completion_tokens == 2


def _request(prompt: str | tuple[int, ...], **sampling: Any) -> Request:
    return Request(prompt, Sampling(**{"max_new_tokens": 12, **sampling}))


def _answer(engine: Engine, prompt: str | tuple[int, ...], **sampling: Any) -> Completion:
    return engine.submit(_request(prompt, **sampling)).result(PATIENCE)


def _scoring(prompt: str | tuple[int, ...], alternatives: int = 0) -> Request:
    return Request(prompt, Sampling(max_new_tokens=0), prompt_logprobs=alternatives)


def _score(engine: Engine, prompt: str | tuple[int, ...], alternatives: int = 0) -> Completion:
    return engine.submit(_scoring(prompt, alternatives)).result(PATIENCE)


def _values(answer: Completion) -> list[float]:
    return [entry.logprob for entry in answer.prompt_logprobs if entry is not None]


def _long(engine: Engine) -> Handle:
    """A request that would take a while, and where the engine knows grammars, cannot end early."""
    grammar = Grammar("regex", "[a-z ]{1000,}") if "regex" in engine.capabilities().grammars else None
    return engine.submit(Request(PROMPTS[0], Sampling(max_new_tokens=512), grammar))


async def _wait(handle: Handle) -> Completion:
    return await handle


def _settle(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something holds that another thread brings about."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.01)


def _known_limit(engine: Engine) -> int:
    limit = engine.capabilities().context_length
    if limit is None:
        pytest.skip("the engine does not know its context length")
    return limit


def _needs(claimed: bool, what: str) -> None:
    if not claimed:
        pytest.skip(f"the engine does not claim {what}")
