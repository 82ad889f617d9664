"""A model in a process of its own, on real weights."""

import os
import signal

import pytest

from calpaca.core.context import fit
from calpaca.core.engine import Sampling
from calpaca.core.errors import CalpacaError, ContextOverflowError, ModelError, ModelNotFoundError
from calpaca.core.events import Result, Token
from calpaca.core.spec import ModelSpec
from calpaca.plugins.app_run import AppRun
from calpaca.plugins.hosting import ModelHost, host

ASKED = [{"role": "user", "content": "What is the capital of France?"}]
SHORT = Sampling(max_new_tokens=16)


@pytest.fixture(scope="module")
def hosted(smollm2):
    model = host(ModelSpec(model=str(smollm2), engine="transformers", dtype="float32"), attaches=False)
    yield model
    model.close()


def test_it_answers_as_the_model_does_here(hosted, smollm2):
    chunks = list(hosted.chat(ASKED, SHORT))
    assert "".join(chunk.text for chunk in chunks) == "The capital of France is Paris."
    assert len(chunks) > 3
    assert chunks[-1].usage.completion_tokens == 8
    details = hosted.engine.capabilities().details
    assert details["engine"] == "transformers"
    assert hosted.fingerprint == details["fingerprint"]
    assert hosted.engine.decode(hosted.engine.encode("A llama.")) == "A llama."
    assert hosted.generate("The capital of France is", Sampling(max_new_tokens=2)).result().text


def test_it_counts_the_tokens_of_the_rendered_prompt(hosted):
    fitted = fit(hosted, [*ASKED, {"role": "assistant", "content": "Paris."}, *ASKED], "drop", max_new_tokens=8)
    assert fitted.use.sent_tokens == hosted.count_tokens(list(fitted.messages))
    with pytest.raises(ContextOverflowError, match="the context holds 8192"):
        hosted.chat([{"role": "user", "content": "long " * 9000}], SHORT).result(60)


def test_an_answer_is_stopped_from_here(hosted):
    handle = hosted.chat(ASKED, Sampling(max_new_tokens=4000, temperature=2.0, seed=1))
    next(iter(handle))
    assert handle.result(60).finish_reason == "cancelled"


@pytest.mark.slow
def test_an_app_runs_on_the_model_that_is_loaded_there_and_can_be_stopped(hosted, smollm2, tmp_path):
    (tmp_path / "a.txt").write_text("The tower of Larkmoor opens at nine in the morning.\n" * 9, encoding="utf-8")
    own = {"model": str(smollm2), "engine": "transformers", "dtype": "float32", "max_new_tokens": 16}
    host_of_apps = ModelHost(attaches=False)
    hosted.chat(ASKED, SHORT).result(60)  # lays the weights out
    before = host_of_apps.memory(hosted)
    run = AppRun("summarize", {**own, "files": [str(tmp_path / "a.txt")], "strategy": "stuff"})
    events = list(host_of_apps.run(hosted, run))
    assert events[-1].value["summary"]
    assert any(isinstance(event, Token) for event in events)
    assert host_of_apps.memory(hosted) < before + 300_000_000  # no second model
    running = host_of_apps.run(hosted, AppRun("summarize", {**run.options, "max_new_tokens": 2000}))
    for event in running:
        if isinstance(event, Token):
            running.cancel()
    assert not isinstance(event, Result)
    with pytest.raises(CalpacaError, match="nothing"):
        list(host_of_apps.run(hosted, AppRun("summarize", {**own, "files": [str(tmp_path / "nothing.txt")]})))


def test_a_crash_fails_what_is_under_way_and_the_next_question_starts_it_again(hosted):
    handle = hosted.chat(ASKED, Sampling(max_new_tokens=4000, temperature=2.0, seed=1))
    chunks = iter(handle)
    next(chunks)
    os.kill(hosted.engine.worker.pid, signal.SIGKILL)
    with pytest.raises(ModelError, match="ended unexpectedly \\(killed by SIGKILL\\)"):
        handle.result(60)
    assert hosted.chat(ASKED, SHORT).result(60).text == "The capital of France is Paris."


def test_a_model_that_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(ModelNotFoundError):
        host(ModelSpec(model=str(tmp_path / "nothing")), attaches=False)
