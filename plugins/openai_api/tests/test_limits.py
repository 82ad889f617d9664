"""What a key and a request may take, and who else may ask: rates, time, other origins, HTTPS, other engines."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from calpaca.core.errors import UsageError
from calpaca.testing import fake_model
from calpaca_openai_api.rates import Rates
from calpaca_openai_api.served import ServedModel
from calpaca_openai_api.settings import KeySettings, digest, read_serve_options


async def test_a_key_with_too_many_requests_in_a_minute_gets_a_429_with_openais_headers(scripted) -> None:
    keys = {"ann": KeySettings(sha256=digest("a"), requests_per_minute=2), "bob": KeySettings(sha256=digest("b"))}
    server = scripted(keys=keys)
    server.client.headers["Authorization"] = "Bearer a"
    left = [(await server.chat()).headers["x-ratelimit-remaining-requests"] for _ in range(2)]
    assert left == ["1", "0"]
    refused = await server.chat()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-should-retry"] == "true"
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert (await server.client.get("/v1/models")).status_code == 200
    server.client.headers["Authorization"] = "Bearer b"
    response = await server.chat()
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]


async def test_tokens_are_counted_when_they_are_known(scripted) -> None:
    server = scripted(keys={"ann": KeySettings(sha256=digest("a"), tokens_per_minute=30)})
    server.client.headers["Authorization"] = "Bearer a"
    assert (await server.chat()).headers["x-ratelimit-remaining-tokens"] == "30"
    refused = await server.chat()
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


def test_what_a_key_has_used_comes_back_with_time() -> None:
    now = [0.0]
    rates, key = Rates(lambda: now[0]), KeySettings(sha256=digest("a"), requests_per_minute=60, tokens_per_minute=600)
    headers = rates.enter("ann", key)
    assert headers["x-ratelimit-reset-requests"] == "1.000s"
    rates.spend("ann", key, 700)
    with pytest.raises(Exception, match="try again in 11 s"):
        rates.enter("ann", key)
    now[0] = 11.0
    assert rates.enter("ann", key)["x-ratelimit-remaining-tokens"] == "10"


async def test_a_request_that_takes_too_long_is_a_504_that_is_not_to_be_repeated(scripted, until) -> None:
    server = scripted("one two three", engine={"delay": 0.2}, timeout=0.3)
    late = await server.chat()
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert late.headers["x-should-retry"] == "false"
    *_, error, done = await server.events("/v1/completions", prompt="a")
    assert (error["error"]["code"], done) == ("timeout", "[DONE]")
    assert await until(lambda: server.engine.running == server.api.admission.running == 0)


async def test_pages_of_named_origins_may_ask(scripted) -> None:
    server = scripted(cors_origins=["https://good.example"], keys={"ann": KeySettings(sha256=digest("a"))})
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://good.example", "https://good.example"), ("https://evil.example", None)):
        preflight = await server.client.options("/v1/chat/completions", headers={"Origin": origin, **asked})
        assert preflight.headers.get("access-control-allow-origin") == allowed
    headers = {"Origin": "https://good.example", "Authorization": "Bearer a"}
    answer = await server.client.get("/v1/models", headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_a_certificate_that_cannot_be_used_is_said_at_once(tmp_path) -> None:
    file = tmp_path / "cert.pem"
    file.write_text("nothing")
    with pytest.raises(UsageError, match="--tls-cert and --tls-key"):
        read_serve_options({"tls_cert": file}, {})
    with pytest.raises(UsageError, match="cannot be used"):
        read_serve_options({"tls_cert": file, "tls_key": file}, {})


async def test_running_requests_are_shown_by_model_and_key(scripted, until) -> None:
    import asyncio

    server = scripted("one two three", engine={"delay": 0.2}, keys={"ann": KeySettings(sha256=digest("a"))})
    server.client.headers["Authorization"] = "Bearer a"
    task = asyncio.create_task(server.chat())
    assert await until(lambda: server.api.admission.running == 1)
    assert 'calpaca_model_requests_running{key="ann",model="fake"} 1.0' in server.api.metrics.text().decode()
    await task
    metrics = server.api.metrics.text().decode()
    assert 'calpaca_model_requests_running{key="ann",model="fake"} 0.0' in metrics
    assert 'calpaca_tokens_per_second_count{model="fake"} 1.0' in metrics


async def test_what_one_engine_refuses_goes_to_another_of_the_same_weights(scripted, monkeypatch) -> None:
    server = scripted("one")
    body = {"messages": [{"role": "user", "content": "Hi"}], "seed": 5, "logprobs": True}
    poor = replace(server.engine.capabilities(), seed=False, max_logprobs=0)
    monkeypatch.setattr(server.engine, "capabilities", lambda: poor)
    refused = await server.post("/v1/chat/completions", **body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "seed")
    rich = fake_model("two")
    monkeypatch.setattr(type(rich), "fingerprint", "of the weights of both")
    for served, model in ((server.api.models.main, server.runtime.fake), (_twin(server, rich), rich)):
        served._model, served._fingerprint = model, type(served._fingerprint)()
        served._take_fingerprint(model)
    answer = await server.post("/v1/chat/completions", **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "two"
    assert json.loads(answer.text)["model"] == "fake"
    plain = await server.chat()
    assert plain.json()["choices"][0]["message"]["content"] == "one"


def _twin(server, model) -> ServedModel:
    served = ServedModel("twin", model.spec, server.runtime)
    server.api.models._add(served)
    return served
