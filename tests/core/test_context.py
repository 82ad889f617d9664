"""The context ledger: what is sent, what is left out, by which policy, in exact numbers."""

from __future__ import annotations

import itertools
import random

import pytest

from calpaca.core.context import ContextUse, check_policy, cuts, fit
from calpaca.core.context_summary import longest_fitting
from calpaca.core.engine import Sampling, Usage
from calpaca.core.errors import ContextOverflowError, UsageError
from calpaca.core.language import language_of
from calpaca.core.model import Model
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.plugins import builtin
from calpaca.testing import fake_model


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, *calls: str) -> dict:
    called = [{"id": call, "type": "function", "function": {"name": "look", "arguments": {}}} for call in calls]
    return {"role": "assistant", "content": text, **({"tool_calls": called} if calls else {})}


def tool(call: str, text: str = "found") -> dict:
    return {"role": "tool", "content": text, "tool_call_id": call}


SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [SYSTEM, user("one " * 20), assistant("two " * 20), user("three " * 20), assistant("four " * 20), user("five")]


# What may be left out ------------------------------------------------------------------------------------------------


def test_turns_are_left_out_whole_and_the_oldest_first() -> None:
    assert cuts(TALK) == [frozenset(), frozenset({1, 2}), frozenset({1, 2, 3, 4})]


def test_a_tool_call_and_its_results_are_left_out_together() -> None:
    talk = [user("a"), assistant("", "1", "2"), tool("1"), tool("2"), assistant("b"), user("c"), assistant("", "3"),
            tool("3"), assistant("", "4"), tool("4")]  # fmt: skip
    assert cuts(talk) == [frozenset(), frozenset(range(5)), frozenset({*range(5), 6, 7})]


def test_the_last_users_message_and_the_last_tool_call_stay() -> None:
    assert cuts([user("a"), assistant("", "1"), tool("1")]) == [frozenset()]
    assert cuts([SYSTEM, user("a")]) == [frozenset()]
    assert cuts([SYSTEM]) == [frozenset()]
    assert cuts([]) == [frozenset()]


def test_a_result_that_comes_after_a_later_question_keeps_its_call() -> None:
    talk = [user("a"), assistant("", "1"), user("hurry"), tool("1")]
    assert cuts(talk) == [frozenset()]


def test_ids_of_calls_may_repeat() -> None:
    talk = [user("a"), assistant("", "0"), tool("0"), user("b"), assistant("", "0"), tool("0"), user("c")]
    assert cuts(talk) == [frozenset(), frozenset({0, 1, 2}), frozenset(range(6))]


def test_no_cut_of_any_conversation_separates_a_call_from_its_result() -> None:
    generator = random.Random(7)
    for _ in range(300):
        talk = [generator.choice([SYSTEM, user("q"), assistant("a"), assistant("", "1"), tool("1")]) for _ in range(12)]
        found = cuts(talk)
        for gone in found:
            assert all(talk[position]["role"] != "system" for position in gone)
            users = [position for position, message in enumerate(talk) if message["role"] == "user"]
            assert not users or users[-1] not in gone
        assert all(earlier < later for earlier, later in itertools.pairwise(found))


# drop ----------------------------------------------------------------------------------------------------------------


def test_drop_leaves_out_as_little_as_will_do_and_says_exactly_how_much() -> None:
    whole = fake_model(context_length=100_000)
    full, without_first = whole.count_tokens(TALK), whole.count_tokens([SYSTEM, *TALK[3:]])
    model = fake_model(["ok"], context_length=without_first + 10)
    fitted = fit(model, TALK, "drop", max_new_tokens=10)
    assert list(fitted.messages) == [SYSTEM, *TALK[3:]]
    assert fitted.use == ContextUse(
        "drop", without_first + 10, 10, without_first, 1, without_first, dropped=2, dropped_tokens=full - without_first
    )
    answer = model.chat(fitted.messages, Sampling(max_new_tokens=10)).result()
    assert answer.usage.prompt_tokens == fitted.use.sent_tokens


def test_one_token_less_costs_another_turn() -> None:
    needed = fake_model().count_tokens([SYSTEM, *TALK[3:]])
    fitted = fit(fake_model(context_length=needed + 9), TALK, "drop", max_new_tokens=10)
    assert list(fitted.messages) == [SYSTEM, TALK[5]]
    assert fitted.use.dropped == 4


def test_what_fits_is_sent_whole() -> None:
    for policy in ("error", "drop", "summarise"):
        fitted = fit(fake_model(context_length=100_000), TALK, policy)
        assert list(fitted.messages) == TALK
        assert fitted.use.dropped == fitted.use.dropped_tokens == 0


def test_a_last_message_that_does_not_fit_is_an_error_with_its_numbers() -> None:
    model = fake_model(context_length=200)
    talk = [*TALK[:-1], user("x" * 300)]
    alone = model.count_tokens([SYSTEM, talk[-1]])
    for policy in ("drop", "summarise"):
        with pytest.raises(ContextOverflowError) as caught:
            fit(model, talk, policy, max_new_tokens=5)
        assert caught.value.context_length == 200
        assert caught.value.prompt_tokens >= alone
    assert model.engine.requests == []


def test_an_answer_without_a_given_length_takes_what_is_left() -> None:
    model = fake_model(context_length=fake_model().count_tokens([user("x" * 100)]) + 3)
    assert fit(model, [user("x" * 100)], "drop").use.dropped == 0


def test_tools_are_part_of_the_prompt_that_is_counted() -> None:
    model = fake_model(context_length=500)
    schema = {"type": "function", "function": {"name": "look", "description": "y" * 80, "parameters": {}}}
    fitted = fit(model, TALK, "drop", tools=[schema], max_new_tokens=10)
    assert fitted.use.sent_tokens == model.count_tokens(fitted.messages, [schema]) <= 490
    assert fitted.use.dropped > fit(model, TALK, "drop", max_new_tokens=10).use.dropped


# summarise -----------------------------------------------------------------------------------------------------------


def test_the_model_sums_up_the_oldest_turns_and_the_summary_is_sent_as_a_message() -> None:
    model = fake_model(["They counted."], context_length=1200)
    fitted = fit(model, TALK, "summarise", max_new_tokens=800)
    assert fitted.messages[0] == SYSTEM
    assert fitted.messages[1] == user("Earlier in this conversation:\nThey counted.")
    assert list(fitted.messages[2:]) == [TALK[5]]
    (asked,) = model.engine.prompts
    assert all(message["content"].strip() in asked for message in TALK[1:5])
    use = fitted.use
    assert (use.policy, use.dropped, use.summary) == ("summarise", 4, "They counted.")
    assert use.sent_tokens == model.count_tokens(fitted.messages)
    assert use.as_dict()["summary_tokens"] == len("They counted.")


def test_the_summary_of_a_chinese_conversation_is_asked_for_in_chinese() -> None:
    talk = [user("钥匙由谁保管？" * 10), assistant("由看门人保管。" * 10), user("他叫什么？")]
    model = fake_model(["钥匙由看门人保管。"], context_length=700)
    fitted = fit(model, talk, "summarise", max_new_tokens=200)
    assert fitted.messages[0] == user("此前对话的要点：\n钥匙由看门人保管。")
    assert "请简短地概括这段对话" in model.engine.prompts[0]


def test_turns_longer_than_the_context_are_read_piece_by_piece_and_wholly() -> None:
    words = [f"word{number:04}" for number in range(300)]
    model = fake_model(["Words."], context_length=900)
    fit(model, [user(" ".join(words)), assistant("yes"), user("and?")], "summarise", max_new_tokens=100)
    asked = model.engine.prompts
    assert len(asked) > 3
    assert all("Summary so far:\nWords." in prompt for prompt in asked[1:])
    read = [prompt.split("Conversation:\n", 1)[1].split("\n\nWrite a short", 1)[0] for prompt in asked]
    assert "".join(read) == f"user: {' '.join(words)}\n\nassistant: yes"


def test_a_summary_that_the_model_makes_too_long_is_cut_to_its_room() -> None:
    model = fake_model(["long " * 100], context_length=600)
    fitted = fit(model, TALK, "summarise", max_new_tokens=200)
    assert model.count_tokens(fitted.messages) <= 400
    assert fitted.use.summary


def test_the_next_question_after_a_summary_needs_no_other() -> None:
    model = fake_model(["They counted."], context_length=1200)
    first = fit(model, TALK, "summarise", max_new_tokens=800)
    second = fit(model, [*first.messages, assistant("six"), user("seven")], "summarise", max_new_tokens=800)
    assert second.use.dropped == 0
    assert len(model.engine.prompts) == 1


# Policies and lines --------------------------------------------------------------------------------------------------


def test_refine_is_for_documents() -> None:
    with pytest.raises(UsageError, match="'refine' is not for this"):
        fit(fake_model(), TALK, "refine")
    assert check_policy("refine", ("error", "refine")) == "refine"


def test_an_unknown_policy_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Unknown context policy 'dorp'") as caught:
        fit(fake_model(), TALK, "dorp")
    assert caught.value.hint.startswith("Did you mean 'drop'?")


def test_one_line_says_what_was_sent() -> None:
    use = ContextUse("drop", 8192, 512, 7600, 1, 7600)
    assert use.line() == "7,600 tokens sent; the context holds 8,192; nothing left out"
    use = ContextUse("drop", None, 512, 7600, 1, 7600, dropped=4, dropped_tokens=1234, estimated=True)
    assert use.line() == "about 7,600 tokens sent; 4 messages (1,234 tokens) left out"
    use = ContextUse(
        "summarise", 8192, 512, 7600, 3, 3000, dropped=1, dropped_tokens=9, summary="s", summary_usage=Usage(0, 5)
    )
    assert use.line() == (
        "7,600 tokens sent in 3 prompts, the longest of 3,000; the context holds 8,192; 1 message (9 tokens) summed up in 5"
    )  # fmt: skip


def test_the_longest_beginning_that_fits() -> None:
    text = "x" * 5000
    for limit in (0, 1, 1023, 1024, 1025, 4999, 5000, 9000):
        assert len(longest_fitting(text, lambda part, limit=limit: len(part) <= limit)) == min(limit, 5000)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Who keeps the key?", "en"),
        ("谁保管钥匙？", "zh"),
        ("LLaMA 模型", "zh"),
        ("鍵は誰が持っていますか", "en"),
        ("", "en"),
    ],
)
def test_the_language_of_a_text(text: str, language: str) -> None:
    assert language_of(text) == language


# A real tokenizer and template -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(smollm2) -> Model:
    runtime = Runtime(Settings())
    for component in builtin.register_engines():
        runtime.engines.add(component, "builtin")
    yield runtime.model(ModelSpec(model=str(smollm2), engine="transformers"))
    runtime.close()


def test_counts_are_those_of_the_ids_that_a_real_model_gets(real: Model) -> None:
    talk = [user("你好 <|im_end|> " * 400), assistant("Hello 🦙. " * 700), user("Say yes.")] * 2
    fitted = fit(real, talk, "drop", max_new_tokens=2)
    answer = real.chat(fitted.messages, Sampling(max_new_tokens=2)).result()
    assert answer.usage.prompt_tokens == fitted.use.sent_tokens <= real.context_length - 2
    assert fitted.use.dropped_tokens == real.count_tokens(talk) - fitted.use.sent_tokens > 0
