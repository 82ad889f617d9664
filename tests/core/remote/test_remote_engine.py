"""The remote engine as a person uses it: named by address or in the settings, in LangChain, on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calpaca.core.engine import Grammar, Sampling
from calpaca.core.engines.remote.address import find_servers, read_address, read_api_key
from calpaca.core.engines.remote.engine import open_engine
from calpaca.core.errors import ContextOverflowError, UnsupportedError, UsageError
from calpaca.core.langchain import CalpacaLLM, ChatCalpaca
from calpaca.core.runtime import Runtime
from calpaca.core.settings import RemoteSettings, read_settings
from calpaca.core.spec import ModelSpec
from calpaca.plugins.wiring import build_runtime
from calpaca.testing import FakeEngine

ROOT = Path(__file__).parents[3]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def runtime(tmp_path, monkeypatch) -> Runtime:
    """A runtime without anybody's settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALPACA_CONFIG", str(tmp_path))
    with build_runtime(read_settings()) as built:
        yield built


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("http://host:8000/v1/", "http://host:8000/v1"),
        ("http://host:8000", "http://host:8000/v1"),
        ("https://host/openai/v1", "https://host/openai/v1"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_addresses_are_read_as_they_are_typed(typed: str, url: str) -> None:
    assert read_address(typed).url == url


def test_a_password_in_an_address_is_used_and_not_shown() -> None:
    address = read_address("https://me:secret@host/v1")
    assert "secret" in address.url and address.shown == "https://host/v1"


@pytest.mark.parametrize("typed", ["host:8000", "ftp://host/v1", "http://", "http://host/v1?key=1", "http://h:port/v1"])
def test_what_is_no_address_is_refused_with_an_example(typed: str) -> None:
    with pytest.raises(UsageError, match="http://host:8000/v1"):
        read_address(typed)


def test_a_model_is_named_with_its_server_or_for_the_servers_of_the_settings() -> None:
    settings = RemoteSettings(endpoints=("http://a/v1", "http://b/v1", "http://a/v1"))
    assert [each.url for each in find_servers("llama", settings)[0]] == ["http://a/v1", "http://b/v1"]
    (only,), model = find_servers("http://c/v1#org/llama-70b", settings)
    assert (only.url, model) == ("http://c/v1", "org/llama-70b")
    with pytest.raises(UsageError, match="knows no server"):
        find_servers("llama", RemoteSettings())


def test_the_key_comes_from_the_environment_or_a_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "key"
    settings = RemoteSettings(api_key_file=file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_api_key(settings)
    file.write_text("two\nlines")
    with pytest.raises(UsageError, match="holds no key") as caught:
        read_api_key(settings)
    assert "lines" not in str(caught.value)
    file.write_text("from-file\n")
    assert read_api_key(settings) == "from-file"
    monkeypatch.setenv("CALPACA_API_KEY", "from-environment")
    assert read_api_key(settings) == "from-environment"
    monkeypatch.delenv("CALPACA_API_KEY")
    assert read_api_key(RemoteSettings()) is None


@pytest.mark.parametrize(
    "given", [{"adapters": ("a",)}, {"tokenizer": "t"}, {"chat_template": "alpaca"}, {"dtype": "float32"},
              {"device": "cuda"}, {"quantization": "4bit"}, {"revision": "main"}],
)  # fmt: skip
def test_what_only_the_server_decides_is_refused_by_name(runtime, given: dict) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(given)).replace("_", " ")):
        open_engine(ModelSpec(model="http://127.0.0.1:9/v1#m", **given), runtime)


def test_checking_a_name_asks_no_server(runtime, tmp_path) -> None:
    spec = runtime.check("http://127.0.0.1:9/v1#m")
    assert (spec.engine, spec.device) == ("remote", "auto")
    assert runtime.check(ModelSpec(model="any name", engine="remote")).model == "any name"


def test_settings_give_endpoints_and_named_models(server, tmp_path, runtime) -> None:
    (tmp_path / "calpaca.toml").write_text(
        f'device = "cpu"\n[remote]\nendpoints = ["{server.url}"]\n[models.big]\nmodel = "smollm2"\nengine = "remote"\n'
    )
    with build_runtime(read_settings()) as configured:
        model = configured.model("big")
        assert model.name == "smollm2"
        assert model.generate("What is a llama?").result(5).text == "The llama is a camelid."
        assert configured.model(ModelSpec(model="big")) is model


def test_a_fingerprint_is_of_name_and_address_unless_the_server_tells_one(serving, connect, runtime) -> None:
    servers = [serving(FakeEngine(), models=("smollm2", "other")) for _ in range(2)]
    prints = {runtime.model(f"{server.url}#{name}").fingerprint for server in servers for name in ("smollm2", "other")}
    assert len(prints) == 4
    told = serving(FakeEngine())
    told.unlisted = lambda handler: handler.send_json({"data": [{"id": "smollm2", "fingerprint": "abc"}]})
    same = serving(FakeEngine())
    same.unlisted = told.unlisted
    assert runtime.model(told.url).fingerprint == runtime.model(same.url).fingerprint


# Requests ------------------------------------------------------------------------------------------------------------


def test_every_sampling_field_is_sent_as_the_server_calls_it(serving, connect) -> None:
    sampling = Sampling(7, 0.5, 0.9, 40, 1.2, 3, ("a", "b"), 2)
    from calpaca.core.engine import Conversation, Request
    from calpaca.core.engines.remote.dialect import DIALECTS, write_request

    path, body = write_request(Request("text", sampling), "m", DIALECTS["vllm"], 7)
    assert path == "/completions"
    expected = {
        "prompt": "text",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 3,
        "logprobs": 2,
    }
    assert expected.items() <= body.items()
    assert (body["repetition_penalty"], body["stop"]) == (1.2, ["a", "b"])
    rarer = Sampling(min_p=0.1, frequency_penalty=0.5, presence_penalty=-0.5, logit_bias=((7, -100.0),))
    _, body = write_request(Request("text", rarer), "m", DIALECTS["vllm"], 7)
    assert (body["min_p"], body["frequency_penalty"], body["presence_penalty"]) == (0.1, 0.5, -0.5)
    assert body["logit_bias"] == {"7": -100.0}
    assert DIALECTS["openai"].unsupported == {"top_k", "repetition_penalty", "min_p"}
    assert DIALECTS["llama_cpp"].unsupported == {"frequency_penalty", "presence_penalty"}
    chat = Request("", sampling, Grammar("json_schema", {"type": "object"}), conversation=Conversation(tuple(QUESTION)))
    path, body = write_request(chat, "m", DIALECTS["llama_cpp"], 7)
    assert (path, body["messages"], body["repeat_penalty"]) == ("/chat/completions", QUESTION, 1.2)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    _, body = write_request(Request("text", grammar=chat.grammar), "m", DIALECTS["llama_cpp"], 7)
    assert body["json_schema"]["type"] == "object" and "response_format" not in body


def test_a_chat_is_rendered_and_counted_by_the_server(serving, smollm2_engine, runtime) -> None:
    from calpaca.core.model import Model

    local = Model("smollm2", ModelSpec(), smollm2_engine, smollm2_engine.template)
    remote = runtime.model(serving(smollm2_engine).url)
    here = local.chat(QUESTION, Sampling(max_new_tokens=12)).result(60)
    there = remote.chat(QUESTION, Sampling(max_new_tokens=12)).result(60)
    assert (there.text, there.token_ids, there.usage) == (here.text, here.token_ids, here.usage)
    assert remote.count_tokens(QUESTION) == local.count_tokens(QUESTION)
    with pytest.raises(UnsupportedError, match="count_tokens"):
        remote.message_ids(QUESTION)


def test_a_long_chat_gets_what_is_left_of_the_context_or_an_error_with_numbers(serving, runtime) -> None:
    engine = FakeEngine(lambda _: "x" * 300, context_length=400)
    model = runtime.model(serving(engine).url)
    long = [{"role": "user", "content": "y" * 300}]
    prompt = model.count_tokens(long)
    answer = model.chat(long).result(5)
    assert (answer.finish_reason, answer.usage.total_tokens) == ("length", 400)
    with pytest.raises(ContextOverflowError) as caught:
        model.chat(long, Sampling(max_new_tokens=200)).result(5)
    assert (caught.value.prompt_tokens, caught.value.context_length) == (prompt, 400)


def test_tools_and_their_results_are_shown_as_text(server, runtime) -> None:
    model = runtime.model(server.url)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
    messages = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    model.chat(messages, tools=[{"type": "function", "function": {"name": "weather"}}]).result(5)
    sent = server.bodies()[-1]["messages"]
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert '"weather"' in sent[0]["content"] and "<tool_call>" in sent[2]["content"] and "sunny" in sent[3]["content"]


# LangChain -----------------------------------------------------------------------------------------------------------


def test_langchain_chats_with_a_server(server, runtime) -> None:
    llm = ChatCalpaca(model=server.url, runtime=runtime, max_tokens=40)
    assert llm.profile is not None and "max_input_tokens" not in llm.profile
    answer = llm.invoke("What is a llama?")
    assert answer.content == "The llama is a camelid."
    assert answer.response_metadata["model_name"] == "smollm2"
    assert "".join(chunk.content for chunk in llm.stream("What?")) == "The llama is a camelid."
    assert [each.content for each in llm.batch(["a", "b", "c"])] == ["The llama is a camelid."] * 3
    assert llm.profile["max_input_tokens"] == 32_768
    assert llm.get_num_tokens_from_messages([answer]) > 0
    assert CalpacaLLM(model=server.url, runtime=runtime).invoke("A llama is") == "The llama is a camelid."


def test_a_plain_server_counts_by_estimate_and_has_no_token_ids(serving, runtime) -> None:
    llm = ChatCalpaca(model=serving(FakeEngine(["Hi."]), "openai").url, runtime=runtime)
    assert llm.get_num_tokens_from_messages([llm.invoke("Hello")]) > 0
    with pytest.raises(UnsupportedError, match="no token ids"):
        llm.get_token_ids("Hello")


def test_structured_output_comes_from_a_server(serving, smollm2_engine, runtime) -> None:
    schema = {
        "title": "animal",
        "type": "object",
        "properties": {"legs": {"type": "integer", "minimum": 0, "maximum": 8}},
        "required": ["legs"],
    }
    llm = ChatCalpaca(model=serving(smollm2_engine, "openai").url, runtime=runtime, max_tokens=60)
    assert 0 <= llm.with_structured_output(schema).invoke("How many legs has a llama?")["legs"] <= 8


def test_a_key_can_be_given_for_one_server(server, runtime, tmp_path) -> None:
    named = f'[models.hosted]\nmodel = "{server.url}"\napi_key = "sk-of-the-settings"\n'
    (tmp_path / "calpaca.toml").write_text(named)
    with build_runtime(read_settings()) as configured:
        configured.model("hosted").generate("a").result(5)
        assert server.asked[-1][1]["Authorization"] == "Bearer sk-of-the-settings"
        assert "sk-of" not in str(configured.settings.model_dump(mode="json")) + repr(configured.settings)
        given = configured.model(ModelSpec(model="hosted", api_key="sk-given"))
        given.generate("a").result(5)
        assert server.asked[-1][1]["Authorization"] == "Bearer sk-given"
        assert given is not configured.model("hosted")
    llm = ChatCalpaca(model=server.url, runtime=runtime, api_key="sk-of-langchain")
    llm.invoke("a")
    assert server.asked[-1][1]["Authorization"] == "Bearer sk-of-langchain"
    ChatCalpaca(model=ModelSpec(model=server.url, api_key="sk-of-a-spec"), runtime=runtime).invoke("a")
    assert server.asked[-1][1]["Authorization"] == "Bearer sk-of-a-spec"
    assert "sk-" not in repr(llm) + str(llm._identifying_params)


# The way there -------------------------------------------------------------------------------------------------------


def test_other_machines_are_asked_through_the_proxy_and_this_one_is_not(server, runtime, monkeypatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there
    assert runtime.model(server.url).generate("a").result(5).text == "The llama is a camelid."
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    model = runtime.model("http://gpu.example:8000/v1#smollm2")
    assert model.generate("a").result(5).text == "The llama is a camelid."
    assert server.asked[-1][1]["Host"] == "gpu.example:8000"


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "ftp://127.0.0.1"])
def test_a_proxy_that_cannot_be_used_is_an_error(runtime, monkeypatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UsageError, match="proxy of the environment"):
        runtime.model("http://gpu.example:8000/v1#smollm2")


# The whole way -------------------------------------------------------------------------------------------------------


def test_embeddings_come_from_a_server(server, runtime) -> None:
    embedder = runtime.embedder(f"{server.url}#e5")
    vectors = embedder.embed_documents(["a llama", "an alpaca", "a llama"])
    assert vectors.shape == (3, embedder.dimensions)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    assert np.array_equal(vectors[0], vectors[2]) and not np.array_equal(vectors[0], vectors[1])
    assert embedder.embed_documents([]).shape == (0, embedder.dimensions)
    runtime.check_embedding(f"{server.url}#e5")
    with pytest.raises(UsageError, match="names no model"):
        runtime.embedder(server.url)


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "sentence_transformers", "peft", "jinja2", "sentencepiece", "llguidance"):
    sys.modules[name] = None  # an import of it fails as if it were not installed
from calpaca.cli.main import start
sys.argv = ["calpaca", *sys.argv[1:]]
start()
"""


def test_documents_are_asked_without_torch(serving, smollm2_engine, tmp_path) -> None:
    server = serving(smollm2_engine)
    arguments = [
        "run", "retrieval_qa", "--file", str(ROOT / "examples" / "handbook.md"), "--question", "When was the dome opened?",
        "--engine", "remote", "--model", f"{server.url}#smollm2", "--embedding", f"{server.url}#e5",
        "--max-new-tokens", "12", "--json",
    ]  # fmt: skip
    environment = {"CALPACA_CACHE": str(tmp_path), "CALPACA_DATA": str(tmp_path), "CALPACA_CONFIG": str(tmp_path)}
    import os

    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=tmp_path, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["answer"] and answer["sources"] and answer["usage"]["prompt_tokens"] > 50
    assert [path for path, _, _ in server.asked if path == "/v1/chat/completions"]
