"""A real OpenAI-compatible server over a real engine, which can also be told what to answer, byte for byte."""

from __future__ import annotations

import io
import json
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from calpaca.core.engine import Chunk, Engine, Grammar, Handle, Request, Sampling, TokenLogprob
from calpaca.core.engines.remote.address import read_address
from calpaca.core.engines.remote.engine import RemoteEngine
from calpaca.core.engines.transformers import open_engine
from calpaca.core.errors import CalpacaError, ContextOverflowError
from calpaca.core.files import ModelFiles
from calpaca.core.runtime import Runtime
from calpaca.core.settings import RemoteSettings, Settings
from calpaca.core.spec import ModelSpec
from calpaca.testing import FakeEmbedder, FakeEngine


@dataclass
class OpenAIServer:
    """Serves `engine` as `smollm2`. `kind` `calpaca` knows what vLLM adds to OpenAI's API, `openai` nothing of it.

    `script` holds what to do with the next requests for answers instead of asking the engine, `questions` the same for
    those about tokens; `unlisted` is what to do with those for the list of models. `asked` records path, headers and body.
    """

    engine: Engine
    kind: str = "calpaca"
    models: tuple[str, ...] = ("smollm2",)
    url: str = ""
    script: list[Callable[[Handler], None]] = field(default_factory=list)
    questions: list[Callable[[Handler], None]] = field(default_factory=list)
    unlisted: Callable[[Handler], None] | None = None
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    running: int = 0

    def bodies(self) -> list[dict[str, Any]]:
        return [body for path, _, body in self.asked if path.endswith("/completions")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: OpenAIServer

    def parse_request(self) -> bool:
        """Take what a proxy is asked (`GET http://host/path`) for the path alone."""
        parsed = super().parse_request()
        if parsed and self.path.startswith("http://"):
            self.path = urlsplit(self.path).path
        return parsed

    # Answers -------------------------------------------------------------------------------------------------------
    def do_GET(self) -> None:
        served = self.server_of
        served.asked.append((self.path, dict(self.headers), {}))
        if served.unlisted is not None:
            served.unlisted(self)
        elif self.path == "/v1/models":
            length = {"max_model_len": served.engine.capabilities().context_length} if served.kind == "calpaca" else {}
            self.send_json({"data": [{"id": name, "owned_by": served.kind, **length} for name in served.models]})
        else:
            self.send_json({"error": {"message": "not found"}}, 404)

    def do_POST(self) -> None:
        served = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served.asked.append((self.path, dict(self.headers), body))
        try:
            if self.path.endswith("/completions") and served.script:
                served.script.pop(0)(self)
            elif self.path.endswith("/completions"):
                self.answer(body)
            elif self.path == "/v1/embeddings":
                self.embed(body)
            elif served.questions:
                served.questions.pop(0)(self)
            elif served.kind == "calpaca":
                self.tokenize(body)
            else:
                self.send_json({"error": {"message": "not found"}}, 404)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self, body: dict[str, Any]) -> None:
        chat = "messages" in body
        try:
            handle = self.server_of.engine.submit(self.read_request(body))
        except ContextOverflowError as error:
            text = (
                f"This model's maximum context length is {error.context_length} tokens. However, you requested "
                f"{error.max_new_tokens} output tokens and your prompt contains {error.prompt_tokens} input tokens."
            )
            self.send_json({"error": {"message": text, "type": "BadRequestError", "param": None, "code": 400}}, 400)
            return
        except CalpacaError as error:
            self.send_json({"error": {"message": str(error), "code": 400}}, 400)
            return
        self.server_of.running += 1
        watch = threading.Thread(target=cancel_when_gone, args=(self.connection, handle), daemon=True)
        watch.start()
        try:
            self.start_stream()
            for chunk in handle:
                self.event(piece(chunk, chat=chat, echoed=self.echoed(body)))
                if chunk.usage is not None:
                    counts = {
                        "prompt_tokens": chunk.usage.prompt_tokens,
                        "completion_tokens": chunk.usage.completion_tokens,
                    }
                    self.event({"choices": [], "usage": counts})
            self.write(b"data: [DONE]\n\n")
            self.end_stream()
        finally:
            handle.cancel()
            self.server_of.running -= 1
            watch.join()

    def read_request(self, body: dict[str, Any]) -> Request:
        engine = self.server_of.engine
        knows_more = self.server_of.kind == "calpaca"
        sampling = Sampling(
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body.get("top_p", 1.0),
            top_k=body.get("top_k", 0) if knows_more else 0,
            repetition_penalty=body.get("repetition_penalty", 1.0) if knows_more else 1.0,
            seed=body.get("seed"),
            stop=tuple(body.get("stop", ())),
            min_p=body.get("min_p", 0.0) if knows_more else 0.0,
            frequency_penalty=body.get("frequency_penalty", 0.0),
            presence_penalty=body.get("presence_penalty", 0.0),
            logit_bias=tuple((int(token_id), value) for token_id, value in body.get("logit_bias", {}).items()),
            logprobs=body.get("top_logprobs") if "messages" in body else body.get("logprobs"),
        )
        grammar = None
        if "response_format" in body:
            grammar = Grammar("json_schema", body["response_format"]["json_schema"]["schema"])
        elif "structured_outputs" in body and knows_more:
            grammar = Grammar("regex", body["structured_outputs"]["regex"])
        if "messages" in body:
            prompt = tuple(engine.encode(engine.template.parts(body["messages"])))
        elif isinstance(body["prompt"], str):
            prompt = tuple(engine.encode(body["prompt"], special_tokens=True))
        else:
            prompt = tuple(body["prompt"])
        scored = body["logprobs"] if body.get("echo") and knows_more else None
        return Request(prompt, sampling, grammar, new_text="messages" in body, prompt_logprobs=scored)

    def echoed(self, body: dict[str, Any]) -> tuple[str, ...]:
        """The texts of a prompt's tokens, where they are to stand before the answer."""
        engine = self.server_of.engine
        return tuple(engine.decode([token]) for token in body["prompt"]) if body.get("echo") else ()

    def tokenize(self, body: dict[str, Any]) -> None:
        engine = self.server_of.engine
        if self.path == "/detokenize":
            self.send_json({"prompt": engine.decode(body["tokens"])})
        else:
            ids = (
                engine.encode(engine.template.parts(body["messages"]))
                if "messages" in body
                else engine.encode(body["prompt"], special_tokens=body["add_special_tokens"])
            )
            self.send_json({"tokens": ids, "count": len(ids)})

    def embed(self, body: dict[str, Any]) -> None:
        vectors = 3.0 * FakeEmbedder().embed_documents(body["input"])
        rows = [{"index": index, "embedding": vector.tolist()} for index, vector in enumerate(vectors)]
        self.send_json({"data": rows[::-1]})

    # Bytes ---------------------------------------------------------------------------------------------------------
    def send_json(self, body: Any, status: int = 200, **headers: str) -> None:
        self.send_bytes(json.dumps(body).encode(), status, **{"Content-Type": "application/json", **headers})

    def send_bytes(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def event(self, body: dict[str, Any]) -> None:
        self.write(b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n")

    def write(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def drop(self) -> None:
        """Close the connection as a crash does: with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.wfile = io.BytesIO()  # the base class flushes it once more
        self.rfile.close()

    def log_message(self, *_: object) -> None:
        pass


def cancel_when_gone(connection: socket.socket, handle: Handle) -> None:
    """Watch for the client's end of the connection while its answer is made."""
    while not handle.done:
        try:
            readable, _, _ = select.select([connection], [], [], 0.02)
            gone = bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):  # reset, or closed by the handler itself
            gone = True
        if gone:
            handle.cancel()
            return


def piece(chunk: Chunk, *, chat: bool, echoed: tuple[str, ...] = ()) -> dict[str, Any]:
    text = {"delta": {"content": chunk.text}} if chat else {"text": "".join(echoed) + chunk.text}
    logprobs = None
    if chunk.logprobs:
        logprobs = chat_logprobs(chunk.logprobs) if chat else completion_logprobs(chunk.logprobs)
    if chunk.prompt_logprobs:
        _, *scored = chunk.prompt_logprobs
        logprobs = completion_logprobs(tuple(entry for entry in scored if entry is not None))
        logprobs = {key: [None, *values] for key, values in logprobs.items()} | {"tokens": list(echoed)}
    choice = {"index": 0, **text, "logprobs": logprobs, "finish_reason": None, "token_ids": list(chunk.token_ids)}
    if chunk.finish_reason is not None:
        choice |= {"finish_reason": chunk.finish_reason, "stop_reason": chunk.stop}
    return {"choices": [choice]}


def chat_logprobs(entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    return {
        "content": [
            {
                "token": entry.text,
                "logprob": entry.logprob,
                "top_logprobs": [{"token": text, "logprob": logprob} for _, text, logprob in entry.top],
            }
            for entry in entries
        ]
    }


def completion_logprobs(entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{text: logprob for _, text, logprob in entry.top} for entry in entries],
    }


Serve = Callable[..., OpenAIServer]


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away are what is tested


@pytest.fixture(scope="session")
def serving() -> Iterator[Serve]:
    """`serving(engine, kind=…)` starts a server, which runs until the tests end."""
    started: list[ThreadingHTTPServer] = []

    def start(engine: Engine, kind: str = "calpaca", **options: Any) -> OpenAIServer:
        served = OpenAIServer(engine, kind, **options)
        http = _Threads(("127.0.0.1", 0), type("Bound", (Handler,), {"server_of": served}))
        served.url = f"http://127.0.0.1:{http.server_port}/v1"
        threading.Thread(target=partial(http.serve_forever, poll_interval=0.02), daemon=True).start()
        started.append(http)
        return served

    yield start
    for http in started:
        http.shutdown()
        http.server_close()


@pytest.fixture(scope="session")
def smollm2_engine(smollm2: Path) -> Iterator[Engine]:
    spec = ModelSpec(device="cpu", dtype="float32")
    engine = open_engine(ModelFiles("smollm2", spec, smollm2, (), smollm2, None), Runtime(Settings()))
    yield engine
    engine.close()


@pytest.fixture
def server(serving: Serve) -> OpenAIServer:
    """A server of its own, over an engine without weights."""
    return serving(FakeEngine(["The llama is a camelid."]))


@pytest.fixture
def connect() -> Iterator[Callable[..., RemoteEngine]]:
    """`connect(server, …)` opens an engine on one or several servers; keywords are settings."""
    opened: list[RemoteEngine] = []

    def open_on(
        *servers: OpenAIServer, model: str | None = None, key: str | None = None, **settings: Any
    ) -> RemoteEngine:
        addresses = [read_address(each.url) for each in servers]
        opened.append(RemoteEngine(addresses, model, RemoteSettings(**{"connect_timeout": 2.0, **settings}), key))
        return opened[-1]

    yield open_on
    for engine in opened:
        engine.close()


@pytest.fixture(autouse=True)
def quick_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait hundredths of a second between tries instead of seconds."""
    monkeypatch.setattr("calpaca.core.engines.remote.endpoints.FIRST_DELAY", 0.02)
    monkeypatch.setattr("calpaca.core.engines.remote.endpoints.LONGEST_DELAY", 0.1)
    monkeypatch.delenv("CALPACA_API_KEY", raising=False)
