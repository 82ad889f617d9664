"""Servers that are slow, busy, broken, or speak something else."""

from __future__ import annotations

import json
import logging
import resource
import socket
import threading
import time
from pathlib import Path

import pytest

from calpaca.core.engine import Request, Sampling
from calpaca.core.engines.remote.answer import AnswerReader
from calpaca.core.engines.remote.dialect import DIALECTS
from calpaca.core.engines.remote.refusal import Asked, PassingError, refusal
from calpaca.core.errors import (
    CalpacaError,
    ContextOverflowError,
    ModelError,
    ModelNotFoundError,
    UnsupportedError,
    UsageError,
)
from calpaca.testing import FakeEngine

ANSWER = "The llama is a camelid."
ASK = Request("What is a llama?", Sampling(max_new_tokens=40))


def answering(status: int, message: str = "not now", **headers: str):
    return lambda handler: handler.send_json({"error": {"message": message}}, status, **headers)


def streaming(*events: bytes, then: str = "end"):
    """Send these bytes as they are, then end the stream, drop the connection or say nothing more."""

    def act(handler) -> None:
        handler.start_stream()
        for event in events:
            handler.write(event)
        if then == "end":
            handler.end_stream()
        elif then == "drop":
            time.sleep(0.1)  # what was sent arrives first
            handler.drop()
        else:
            time.sleep(30)

    return act


def data(**choice: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"


# Before an answer begins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(server, connect, status: int) -> None:
    server.script += [answering(status), answering(status)]
    assert connect(server).submit(ASK).result(10).text == ANSWER
    assert len(server.bodies()) == 3


@pytest.mark.parametrize("wait", ["0.4", "Sun, 06 Nov 1994 08:49:37 GMT", "soon"])
def test_retry_after_is_honoured(server, connect, wait: str) -> None:
    server.script.append(answering(429, Retry_After=wait))
    started = time.monotonic()
    assert connect(server).submit(ASK).result(10).text == ANSWER
    assert (time.monotonic() - started >= 0.4) == (wait == "0.4")


def test_a_server_that_wants_to_be_left_alone_for_long_is_an_error_at_once(server, connect) -> None:
    server.script.append(answering(429, "quota used up", Retry_After="3600"))
    with pytest.raises(ModelError, match=r"quota used up.* 3600 s"):
        connect(server).submit(ASK).result(5)


def test_after_the_last_try_the_error_says_why(server, connect) -> None:
    server.script += [answering(503, "loading the model")] * 3
    with pytest.raises(ModelError, match=r"after 3 tries: answered 503: loading the model"):
        connect(server, retries=2).submit(ASK).result(10)
    assert len(server.bodies()) == 3


def test_a_connection_that_drops_before_the_answer_is_tried_again(server, connect) -> None:
    server.script += [lambda handler: handler.drop(), streaming(data(delta={"role": "assistant"}), then="drop")]
    assert connect(server).submit(ASK).result(10).text == ANSWER


def test_a_question_that_meets_a_closing_connection_is_asked_once_more(server, connect) -> None:
    engine = connect(server)
    ids = engine.encode("A llama")
    server.questions.append(lambda handler: handler.drop())
    assert engine.encode("A llama") == ids
    server.questions += [lambda handler: handler.drop()] * 2
    with pytest.raises(ModelError, match="does not count tokens now"):
        engine.encode("A llama")


def test_an_error_of_the_server_is_not_tried_again(server, connect) -> None:
    server.script.append(answering(500, "CUDA out of memory"))
    with pytest.raises(ModelError, match="failed with 500: CUDA out of memory"):
        connect(server).submit(ASK).result(5)
    assert len(server.bodies()) == 1


def test_no_server_is_an_error_that_names_it(serving, connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = serving(FakeEngine())
    server.url = f"http://127.0.0.1:{port}/v1"
    with pytest.raises(ModelError, match=rf"127\.0\.0\.1:{port}/v1 cannot be asked"):
        connect(server)


def test_what_is_no_api_at_all_is_said(server, connect) -> None:
    server.unlisted = lambda handler: handler.send_bytes(b"<html><h1>Welcome to nginx!</h1></html>")
    with pytest.raises(ModelError, match="not with JSON"):
        connect(server)


def test_a_server_without_a_list_of_models_needs_a_name(server, connect) -> None:
    server.unlisted = lambda handler: handler.send_bytes(b"<html>404</html>", 404)
    with pytest.raises(UsageError, match="no list of its models"):
        connect(server)
    assert connect(server, model="any").submit(ASK).result(5).text == ANSWER


# While an answer comes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["drop", "end"])
def test_an_answer_that_breaks_off_is_an_error_and_never_a_short_answer(server, connect, then: str) -> None:
    server.script.append(streaming(data(text="The "), data(text="llama"), then=then))
    handle = connect(server).submit(ASK)
    streamed = ""
    with pytest.raises(ModelError, match="broke off before its end"):
        for chunk in handle:
            streamed += chunk.text
    assert streamed == "The llama"
    assert len(server.bodies()) == 1


def test_a_server_that_falls_silent_is_an_error_after_the_time_limit(server, connect) -> None:
    server.script.append(streaming(data(text="The "), then="hang"))
    with pytest.raises(ModelError, match=r"no sign of life for 0\.3 s"):
        connect(server, timeout=0.3).submit(ASK).result(5)


def test_comments_are_signs_of_life(server, connect) -> None:
    def slowly(handler) -> None:
        handler.start_stream()
        for _ in range(5):
            handler.write(b": still here\n\n")
            time.sleep(0.15)
        handler.write(data(text="Done.", finish_reason="stop"))
        handler.end_stream()

    server.script.append(slowly)
    assert connect(server, timeout=0.4).submit(ASK).result(5).text == "Done."


def test_without_usage_and_done_the_tokens_are_estimated(server, connect) -> None:
    server.script.append(streaming(data(text="The "), data(text="llama", finish_reason="length")))
    answer = connect(server).submit(ASK).result(5)
    assert (answer.text, answer.finish_reason) == ("The llama", "length")
    assert answer.usage.estimated and answer.usage.completion_tokens == 2 and answer.usage.prompt_tokens > 0


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (b"data: {not json\n\n", r"no piece of an answer: '\{not json'"),
        (b"data: [1]\n\n", "no piece of an answer"),
        (b'data: {"choices": ["text"]}\n\n', "no piece of an answer"),
        (b'data: {"error": {"message": "EngineDeadError", "code": 500}}\n\n', "failed while it answered: EngineDeadError"),
        (data(text="", finish_reason="content_filter"), "content_filter"),
        (data(delta={"tool_calls": [{"index": 0}]}), "called a tool"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error(server, connect, event: bytes, message: str) -> None:
    server.script.append(streaming(data(text="The "), event, then="hang"))
    with pytest.raises(ModelError, match=message):
        connect(server).submit(ASK).result(5)


def test_a_whole_answer_in_odd_bytes_is_read(server, connect) -> None:
    stream = (
        b"\xef\xbb\xbf: hello\r\n\r\n"
        + data(text="🦙 \u2028").replace(b"\n", b"\r\n")
        + data(text="", finish_reason="stop").replace(b"\n", b"\r")
        + b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
        + b"data: [DONE]\n\n"
    )
    server.script.append(streaming(*(bytes([byte]) for byte in stream)))
    answer = connect(server).submit(ASK).result(5)
    assert (answer.text, answer.usage.total_tokens, answer.usage.estimated) == ("🦙 \u2028", 5, False)


def test_stop_texts_are_looked_for_here_where_the_server_loses_text_over_them(server, connect) -> None:
    """llama.cpp drops what it held back for a stop text when the answer ends by its length."""
    engine = connect(server, server="llama_cpp")
    pieces = [data(text=text) for text in ("One, tw", "o, thr", "ee")]
    server.script.append(streaming(*pieces, data(text="", finish_reason="length"), b"data: [DONE]\n\n"))
    answer = engine.submit(Request((1, 2), Sampling(max_new_tokens=40, stop=("reef",)))).result(5)
    assert (answer.text, answer.finish_reason, answer.stop) == ("One, two, three", "length", None)
    server.script.append(streaming(*pieces, data(text=" more"), then="hang"))
    answer = engine.submit(Request((1, 2), Sampling(max_new_tokens=40, stop=("two",)))).result(5)
    assert (answer.text, answer.finish_reason, answer.stop) == ("One, ", "stop", "two")
    assert "stop" not in server.bodies()[-1]


def test_a_connection_is_used_again(server, connect) -> None:
    engine = connect(server)
    ports = []
    for _ in range(3):
        server.script.append(
            lambda handler: (
                ports.append(handler.client_address[1]),
                streaming(data(text="x", finish_reason="stop"), b"data: [DONE]\n\n")(handler),
            )
        )
        engine.submit(ASK).result(5)
    assert len(set(ports)) == 1


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "Unsupported value", "param": "temperature"}}, "because of 'temperature'.*--temperature"),
        ({"error": {"message": "max_tokens is not supported with this model"}}, "'max_tokens'.*--max-new-tokens"),
        ({"detail": [{"loc": ["body", "top_p"], "msg": "Field not allowed"}]}, "'top_p': Field not allowed"),
        ({"object": "error", "message": "Something else."}, "Something else"),
        ({"error": "a plain text"}, "a plain text"),
    ],
)  # fmt: skip
def test_a_refused_field_is_named(server, connect, body: dict, words: str) -> None:
    server.script.append(lambda handler: handler.send_json(body, 400))
    with pytest.raises(UnsupportedError) as caught:
        connect(server).submit(ASK).result(5)
    import re

    assert re.search(words, str(caught.value))


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        ("This model's maximum context length is 4097 tokens. However, you requested 4927 tokens (3927 in the messages, "
         "1000 in the completion). Please reduce the length.", (3927, 4097)),
        ("This model's maximum context length is 128000 tokens. However, you requested 65535 output tokens and your "
         "prompt contains at least 62466 input tokens, for a total of at least 128001 tokens.", (62466, 128000)),
        ("'max_tokens' or 'max_completion_tokens' is too large: 9000. This model's maximum context length is 8192 tokens "
         "and your request has 40 input tokens (9000 > 8192 - 40).", (40, 8192)),
        ("request (3001 tokens) exceeds the available context size (512 tokens), try increasing it", (3001, 512)),
    ],
)  # fmt: skip
def test_a_context_overflow_is_told_with_the_servers_numbers(message: str, numbers: tuple[int, int]) -> None:
    content = json.dumps({"error": {"message": message, "code": 400}}).encode()
    error = refusal(400, {}, content, Asked("http://x/v1", {"max_tokens": 1000}, DIALECTS["openai"]))
    assert isinstance(error, ContextOverflowError)
    assert (error.prompt_tokens, error.context_length) == numbers


def test_llama_cpps_numbers_are_taken_from_its_fields() -> None:
    content = b'{"error": {"code": 400, "message": "too long", "n_prompt_tokens": 600, "n_ctx": 512}}'
    error = refusal(400, {}, content, Asked("http://x/v1", {"max_tokens": 5}, DIALECTS["llama_cpp"]))
    assert isinstance(error, ContextOverflowError) and error.prompt_tokens == 600


def test_a_redirect_names_the_other_address() -> None:
    error = refusal(307, {"location": "https://x/v1/"}, b"", Asked("http://x/v1", {}, DIALECTS["openai"]))
    assert "https://x/v1/" in str(error)


def test_an_error_page_is_shown_without_its_markup() -> None:
    error = refusal(502, {}, b"<html><body><h1>502 Bad Gateway</h1></body></html>", Asked("u", {}, DIALECTS["openai"]))
    assert isinstance(error, PassingError) and error.reason == "answered 502: 502 Bad Gateway"


def test_the_key_is_sent_and_never_shown(server, connect, caplog) -> None:
    key = "sk-very-secret-0123456789"
    caplog.set_level(logging.DEBUG, logger="calpaca")
    engine = connect(server, key=key)
    assert engine.submit(ASK).result(5).text == ANSWER
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {f"Bearer {key}"}
    server.script.append(answering(401, f"Incorrect API key provided: {key}"))
    with pytest.raises(ModelError, match="refuses the key") as caught:
        engine.submit(ASK).result(5)
    shown = [str(caught.value), repr(caught.value), repr(engine.capabilities()), caplog.text]
    assert not any(key in text for text in shown)
    assert engine.capabilities().details["fingerprint"] == connect(server).capabilities().details["fingerprint"]


def test_a_model_that_the_server_lacks_is_an_error_with_the_nearest_name(server, connect) -> None:
    with pytest.raises(ModelNotFoundError, match=r"Unknown model 'smollm'.*Did you mean 'smollm2'"):
        connect(server, model="smollm")


def test_among_several_models_one_must_be_named(serving, connect) -> None:
    server = serving(FakeEngine([ANSWER]), models=("one", "two"))
    with pytest.raises(UsageError, match="several models: one, two"):
        connect(server)
    assert connect(server, model="two").submit(ASK).result(5).text == ANSWER
    assert server.bodies()[0]["model"] == "two"


def test_a_grammar_that_the_server_ignored_is_noticed(server, connect) -> None:
    from calpaca.core.engine import Grammar

    engine = connect(server)
    for grammar, text in ((Grammar("regex", "yes|no"), "maybe"), (Grammar("json_schema", {"type": "object"}), "{")):
        server.script.append(streaming(data(text=text, finish_reason="stop"), b"data: [DONE]\n\n"))
        with pytest.raises(UnsupportedError, match="did not keep to the"):
            engine.submit(Request("a", grammar=grammar)).result(5)


def test_too_many_stop_texts_for_openai_are_refused(serving, connect) -> None:
    engine = connect(serving(FakeEngine([ANSWER]), "openai"))
    with pytest.raises(UnsupportedError, match="at most 4 stop texts"):
        engine.submit(Request("a", Sampling(stop=("1", "2", "3", "4", "5"))))


def test_a_stop_reason_that_is_a_token_is_no_stop_text() -> None:
    reader = AnswerReader("x")
    reader.read(json.dumps({"choices": [{"text": "a", "finish_reason": "stop", "stop_reason": 2}]}))
    assert (reader.finish, reader.stop) == ("stop", None)


# Cancelling ----------------------------------------------------------------------------------------------------------


def settles(holds, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_cancelling_closes_the_connection(serving, connect) -> None:
    server = serving(FakeEngine(["word " * 500], delay=0.02))
    handle = connect(server).submit(Request("a", Sampling(max_new_tokens=2000)))
    next(iter(handle))
    handle.cancel()
    assert handle.result(2).finish_reason == "cancelled"
    assert settles(lambda: server.running == 0)


def test_cancelling_ends_the_wait_between_tries(server, connect) -> None:
    server.script.append(answering(429, Retry_After="60"))
    handle = connect(server).submit(ASK)
    assert settles(lambda: len(server.bodies()) == 1)
    handle.cancel()
    assert handle.result(1).finish_reason == "cancelled"


def test_200_random_cancels_leave_nothing_running(serving, connect) -> None:
    import random

    chance = random.Random(4)
    server = serving(FakeEngine(["word " * 40], delay=0.005, slots=16))
    engine = connect(server)

    def ask_and_leave(seconds: float) -> None:
        handle = engine.submit(Request("a", Sampling(max_new_tokens=2000)))
        time.sleep(seconds)
        handle.cancel()
        assert handle.result(10).finish_reason in {"cancelled", "stop"}

    threads = [threading.Thread(target=ask_and_leave, args=(chance.uniform(0, 0.3),)) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert settles(lambda: server.running == 0 and server.engine.running == 0)
    assert all(endpoint.busy == 0 for endpoint in engine._endpoints.all)


@pytest.mark.slow
def test_memory_is_flat_over_1000_requests(serving, connect) -> None:
    engine = connect(serving(FakeEngine(["word " * 20])))

    def ask(waves: int) -> None:
        for _ in range(waves):
            handles = [engine.submit(Request(f"{number} llamas", Sampling(max_new_tokens=40))) for number in range(50)]
            assert all(handle.result(30).text for handle in handles)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    ask(6)
    before = resident()
    ask(20)
    assert resident() - before < 16 << 20  # the server's own list of what it was asked is in it


def test_closing_ends_what_runs(serving, connect) -> None:
    server = serving(FakeEngine(["word " * 500], delay=0.02))
    engine = connect(server)
    handles = [engine.submit(Request("a", Sampling(max_new_tokens=2000))) for _ in range(3)]
    time.sleep(0.1)
    engine.close()
    engine.close()
    assert {handle.result(1).finish_reason for handle in handles} == {"cancelled"}
    for call in (lambda: engine.submit(ASK), lambda: engine.encode("a")):
        with pytest.raises(ModelError, match="closed"):
            call()


def test_requests_that_race_with_closing_end_all_the_same(serving, connect) -> None:
    engine = connect(serving(FakeEngine(["word " * 50], delay=0.01)))
    handles = []

    def submit() -> None:
        try:
            for _ in range(500):
                handles.append(engine.submit(Request("a", Sampling(max_new_tokens=500))))
        except ModelError:
            pass

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join()
    assert {handle.result(5).finish_reason for handle in handles} <= {"cancelled"}


def test_many_requests_at_once_go_through(serving, connect) -> None:
    server = serving(FakeEngine(lambda prompt: prompt, slots=64))
    engine = connect(server)
    handles = [engine.submit(Request(f"text {number}", Sampling(max_new_tokens=40))) for number in range(100)]
    assert [handle.result(30).text for handle in handles] == [f"text {number}" for number in range(100)]


# Several servers -----------------------------------------------------------------------------------------------------


def test_the_least_busy_server_is_asked(serving, connect) -> None:
    servers = [serving(FakeEngine(["word " * 20], delay=0.01)) for _ in range(3)]
    engine = connect(*servers)
    handles = [engine.submit(Request("a", Sampling(max_new_tokens=400))) for _ in range(9)]
    for handle in handles:
        handle.result(10)
    assert [len(server.bodies()) for server in servers] == [3, 3, 3]


def test_a_server_that_fails_is_left_alone_until_it_is_well(serving, connect) -> None:
    ill, well = (serving(FakeEngine([ANSWER])) for _ in range(2))
    engine = connect(ill, well)
    ill.unlisted = answering(503)
    ill.script += [answering(503)] * 20
    assert {engine.submit(ASK).result(5).text for _ in range(6)} == {ANSWER}
    assert len(ill.bodies()) == 1
    ill.script.clear()
    ill.unlisted = None
    assert settles(lambda: len(engine._endpoints.awake()) == 2)
    for _ in range(4):
        engine.submit(ASK).result(5)
    assert len(ill.bodies()) == 3


def test_one_server_of_two_is_enough_to_begin(serving, connect, caplog) -> None:
    ill, well = (serving(FakeEngine([ANSWER])) for _ in range(2))
    ill.unlisted = answering(503, "loading")
    engine = connect(ill, well)
    assert "loading" in caplog.text
    assert engine.submit(ASK).result(5).text == ANSWER
    ill.unlisted = None
    assert settles(lambda: len(engine._endpoints.awake()) == 2)


def test_servers_of_two_kinds_are_refused(serving, connect) -> None:
    servers = [serving(FakeEngine([ANSWER]), kind) for kind in ("calpaca", "openai")]
    with pytest.raises(UsageError, match="several kinds: calpaca, openai"):
        connect(*servers)
    assert connect(*servers, server="openai").submit(ASK).result(5).text == ANSWER


def test_every_error_says_what_to_do(server, connect) -> None:
    for status in (400, 401, 404, 418, 500):
        server.script.append(answering(status))
        with pytest.raises(CalpacaError) as caught:
            connect(server).submit(ASK).result(5)
        assert caught.value.hint and caught.value.message.endswith(".")
