"""Many instructions through one engine: order, seeds, failures, resuming."""

import io
import itertools
import json
import time

import pytest

from calpaca.core.engine import Sampling
from calpaca.core.errors import ModelError
from calpaca.core.generation import KIND, Generation
from calpaca.core.instructions import read_instructions
from calpaca.core.jobs import Ledger
from calpaca.core.predictions import generation_config, write_predictions
from calpaca.testing import fake_model

GREEDY, SAMPLED = Sampling(max_new_tokens=12), Sampling(max_new_tokens=12, temperature=1.0)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "jobs.sqlite")


def instructions(*texts: str):
    return read_instructions("\n".join(texts), "tasks.txt")


def answered(ledger: Ledger, generation: Generation):
    with ledger.start(KIND, "Answer", {}) as job:
        return list(generation.answers(job)), job


def echo(prompt: str) -> str:
    _, _, question = prompt.rpartition("<|im_start|>user\n")
    return question.partition("<|im_end|>")[0].upper()


def test_answers_keep_the_order_of_the_file_while_requests_run_side_by_side(ledger):
    model = fake_model(lambda prompt: echo(prompt) + " word" * (len(prompt) % 7), delay=0.002)
    texts = [f"question {number}" + "?" * (number % 5) for number in range(40)]
    answers, job = answered(ledger, Generation(model, instructions(*texts), Sampling(), wrapped=True, in_flight=16))
    assert [place for place, _ in answers] == list(range(40))
    assert all(answer.text.startswith(text.upper()) for text, (_, answer) in zip(texts, answers, strict=True))
    assert 1 < model.engine.peak <= 16
    assert (job.done, job.total) == (40, 40)


def test_wrapped_instructions_are_chats_and_others_are_continued_as_they_stand(ledger):
    model = fake_model(["fine"])
    asked = instructions("How are you?")
    answered(ledger, Generation(model, asked, GREEDY, wrapped=False))
    answered(ledger, Generation(model, asked, GREEDY, wrapped=True, system="Be kind."))
    plain, chat = model.engine.prompts
    assert plain == "How are you?"
    assert chat.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>")


def test_a_second_run_asks_only_what_is_new(ledger):
    model = fake_model(echo)
    first, _ = answered(ledger, Generation(model, instructions("a", "b", "c", "b"), GREEDY, wrapped=True))
    second, job = answered(ledger, Generation(model, instructions("c", "b", "d"), GREEDY, wrapped=True))
    assert [answer.text for _, answer in first] == ["A", "B", "C", "B"]
    assert [answer.text for _, answer in second] == ["C", "B", "D"]
    assert (job.reused, len(model.engine.prompts)) == (2, 4)


def test_other_sampling_another_system_text_and_another_form_are_other_answers(ledger):
    model, asked = fake_model(echo), instructions("a")
    answered(ledger, Generation(model, asked, GREEDY, wrapped=True))
    for other in (
        Generation(model, asked, Sampling(max_new_tokens=3), wrapped=True),
        Generation(model, asked, GREEDY, wrapped=True, system="Be kind."),
        Generation(model, asked, GREEDY, wrapped=False),
    ):
        assert answered(ledger, other)[1].reused == 0


def test_sampled_answers_depend_on_seed_and_place_and_on_nothing_else(tmp_path):
    asked = instructions("same", "same", "same")

    def run(name: str, sampling: Sampling, in_flight: int) -> list[str]:
        generation = Generation(fake_model(), asked, sampling, wrapped=False, in_flight=in_flight)
        return [answer.text for _, answer in answered(Ledger(tmp_path / name), generation)[0]]

    texts = run("a", SAMPLED, 8)
    assert len(set(texts)) == 3
    assert run("b", SAMPLED, 1) == texts
    assert run("c", Sampling(max_new_tokens=12, temperature=1.0, seed=0), 8) == texts
    assert run("d", Sampling(max_new_tokens=12, temperature=1.0, seed=1), 8)[0] == texts[1]


def test_what_is_wrong_with_an_instruction_stands_in_its_place_and_is_tried_again(ledger):
    model = fake_model(echo, context_length=120)
    asked = instructions("a", "x" * 200, "b", "x" * 200)
    answers, job = answered(ledger, Generation(model, asked, GREEDY, wrapped=True))
    assert [answer.text for _, answer in answers] == ["A", "", "B", ""]
    assert "the context holds 120" in answers[1][1].error
    assert answers[3][1].error == answers[1][1].error
    assert job.done == 2
    larger = fake_model(echo)
    again, job = answered(ledger, Generation(larger, asked, GREEDY, wrapped=True))
    assert all(answer.error is None for _, answer in again)
    assert (job.reused, len(larger.engine.prompts)) == (2, 1)


def test_an_engine_that_fails_time_after_time_ends_the_run_and_loses_nothing(ledger):
    answers = itertools.chain(["fine"] * 3, itertools.repeat(ModelError("The server is gone.", "Start it.")))
    model = fake_model(lambda _: next(answers))
    asked = instructions(*(f"question {number}" for number in range(50)))
    generation = Generation(model, asked, GREEDY, wrapped=True, in_flight=1)
    with pytest.raises(ModelError, match=r"8 instructions one after the other failed.*The server is gone"):
        answered(ledger, generation)
    record = ledger.jobs()[0]
    assert (record.state, record.done) == ("failed", 3)


def test_single_failures_do_not_end_the_run(ledger):
    fails = itertools.cycle([ModelError("hiccup"), "fine"])
    model = fake_model(lambda _: next(fails))
    asked = instructions(*(f"question {number}" for number in range(40)))
    answers, _ = answered(ledger, Generation(model, asked, GREEDY, wrapped=True, in_flight=1))
    assert sum(answer.error == "hiccup" for _, answer in answers) == 20


def test_leaving_a_run_cancels_what_is_under_way_and_keeps_what_is_answered(ledger):
    model = fake_model(lambda prompt: "short" if "first" in prompt else "word " * 500, delay=0.01)
    generation = Generation(model, instructions("first", *"abcdefg"), Sampling(max_new_tokens=2000), wrapped=True)
    with pytest.raises(GeneratorExit), ledger.start(KIND, "Answer", {}) as job:
        answers = generation.answers(job)
        next(answers)
        answers.close()
        raise GeneratorExit
    started = time.monotonic()
    while model.engine.running:
        assert time.monotonic() - started < 5
        time.sleep(0.01)
    assert (ledger.jobs()[0].state, ledger.jobs()[0].done) == ("cancelled", 1)


def test_jsonl_keeps_the_row_and_says_what_failed(ledger):
    asked = read_instructions('{"id": 7, "prompt": "a"}\n{"id": 8, "prompt": "' + "x" * 200 + '"}', "tasks.jsonl")
    generation = Generation(fake_model(echo, context_length=120), asked, GREEDY, wrapped=True)
    stream = io.StringIO()
    with ledger.start(KIND, "Answer", {}) as job:
        list(write_predictions(generation, job, stream))
    good, bad = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (good["index"], good["input"], good["answer"], good["finish_reason"]) == (
        0,
        {"id": 7, "prompt": "a"},
        "A",
        "stop",
    )
    assert good["usage"]["completion_tokens"] > 0
    assert (bad["index"], bad["input"]["id"]) == (1, 8)
    assert "the context holds 120" in bad["error"]


def test_the_seed_form_has_the_prompt_as_the_model_saw_it(ledger):
    generation = Generation(fake_model(echo), instructions("a", "b"), GREEDY, wrapped=True)
    stream = io.StringIO()
    with ledger.start(KIND, "Answer", {}) as job:
        list(write_predictions(generation, job, stream, "seed"))
    pairs = json.loads(stream.getvalue())
    assert [pair["Output"] for pair in pairs] == ["A", "B"]
    assert pairs[0]["Input"] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert generation_config(GREEDY)["do_sample"] is False
