"""Servers for tests: one on a scripted engine without a socket, one with real weights on a port."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.plugins.wiring import build_runtime
from calpaca.testing import FakeRuntime, fake_runtime
from calpaca_openai_api.process import Server, open_socket, run
from calpaca_openai_api.served import ServedModels
from calpaca_openai_api.server import Api, build_app
from calpaca_openai_api.settings import KeySettings, ServeOptions

MODEL = "smollm2-135m-instruct"
SCHEMAS = Path(__file__).parents[4] / "shared/data/openai_openapi_subset.json"


@dataclass
class Scripted:
    """A server on a fake engine, asked without a socket."""

    runtime: FakeRuntime
    api: Api
    client: httpx2.AsyncClient
    app: Any

    @property
    def engine(self) -> Any:
        return self.runtime.fake.engine

    async def chat(self, text: str = "Hi", **fields: Any) -> httpx2.Response:
        return await self.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **fields)

    async def post(self, path: str, **fields: Any) -> httpx2.Response:
        return await self.client.post(path, json=fields)

    async def events(self, path: str, **fields: Any) -> list[Any]:
        """The data of a stream's events, `[DONE]` as text."""
        response = await self.post(path, stream=True, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.endswith("\n\n")
        frames = response.text.removesuffix("\n\n").split("\n\n")
        assert all(frame.startswith("data: ") for frame in frames)
        found = [frame.removeprefix("data: ") for frame in frames]
        return [each if each == "[DONE]" else json.loads(each) for each in found]


@pytest.fixture
def scripted() -> Callable[..., Scripted]:
    """`scripted(answers, keys=…, settings=…, embedder=…, **options)` makes a server; engine options go in `engine`."""

    def make(
        answers: Any = ("The llama is a camelid.",),
        *,
        keys: dict[str, KeySettings] | None = None,
        settings: Settings | None = None,
        engine: dict[str, Any] | None = None,
        embedder: Any = None,
        **options: Any,
    ) -> Scripted:
        runtime = fake_runtime(answers, settings=settings, embedder=embedder, **(engine or {}))
        chosen = ServeOptions(**options)
        app, api = build_app(ServedModels(runtime, ModelSpec(model="fake")), chosen, keys or {})
        transport = httpx2.ASGITransport(app)
        return Scripted(runtime, api, httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000"), app)

    return make


@dataclass
class Running:
    """A server with real weights on a port of this machine."""

    url: str
    api: Api
    runtime: Runtime

    @property
    def rows(self) -> int:
        """Requests that the engine works on or has waiting."""
        engine: Any = self.api.models.main.load().engine
        return len(engine.batch.rows) + len(engine.batch.waiting)

    def settle(self, seconds: float = 5.0) -> bool:
        """Whether everything has ended within that time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.rows == 0 and self.api.admission.running == self.api.admission.waiting == 0:
                return True
            time.sleep(0.02)
        return False


@contextmanager
def serve(options: ServeOptions, keys: dict[str, KeySettings] | None = None, **settings: Any) -> Iterator[Running]:
    with build_runtime(Settings(device="cpu", **settings)) as runtime:
        models = ServedModels(runtime, runtime.check(options.spec()), None, options.named_adapters)
        models.main.load()
        models.load_adapters()
        app, api = build_app(models, options, keys or {})
        listener = open_socket(options.host, options.port)
        server = Server(app, api, options)
        thread = threading.Thread(target=run, args=[server, listener])
        thread.start()
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", api, runtime)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[Running]]:
    """`serving(options, keys, **settings)` serves real weights for as long as its context is open."""
    return serve


@pytest.fixture(scope="session")
def running(smollm2: Path, e5: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """SmolLM2 in float32, a second model of the same weights in bfloat16, e5, and retrieval_qa over a handbook."""
    folder = tmp_path_factory.mktemp("served")
    handbook = folder / "handbook.md"
    handbook.write_text("# Keys\n\nThe key of the archive is kept by Mrs Abendroth on the second floor.\n")
    options = ServeOptions(
        model=MODEL, dtype="float32", engine="transformers", port=0, temperature=0.0,
        responses=folder / "responses.sqlite",
    )  # fmt: skip
    with serve(
        options,
        models={"half": ModelSpec(model=MODEL, dtype="bfloat16")},
        apps={"handbook": {"app": "retrieval_qa", "files": [str(handbook)], "dtype": "float32"}},
    ) as running:
        yield running


@pytest.fixture
def program(smollm2: Path, tmp_path: Path):
    """`program(*flags)` starts `calpaca serve` and gives its process and address."""
    started = []

    def start(*flags: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "calpaca", "serve", "--model", str(smollm2), "--port", "0", *flags]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ)
        started.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Serving"):
                return process, line.split()[-1]
        raise AssertionError("it did not start")

    yield start
    for process in started:
        process.kill()
        process.communicate()


def fixed(schema: Any) -> Any:
    """A published schema as JSON Schema 2020-12: some of it is still OpenAPI 3.0."""
    if isinstance(schema, list):
        return [fixed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: fixed(each) for key, each in schema.items() if key != "$recursiveRef"}
    if schema.pop("nullable", False):
        return {"anyOf": [schema, {"type": "null"}]}
    return schema


@pytest.fixture(scope="session")
def published() -> dict[str, Any]:
    """OpenAI's published schemas, by name."""
    if not SCHEMAS.is_file():
        pytest.skip(f"OpenAI's published schemas are not at {SCHEMAS}")
    schemas: dict[str, Any] = fixed(json.loads(SCHEMAS.read_text(encoding="utf-8")))["components"]["schemas"]
    return schemas


@pytest.fixture(scope="session")
def fits(published: dict[str, Any]) -> Callable[[str, Any], None]:
    """`fits(name, value)` fails unless a value is of the published schema of that name."""
    from jsonschema import Draft202012Validator

    components = {"schemas": published}

    def check(name: str, value: Any) -> None:
        validator = Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": components})
        errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
        assert not errors, errors

    return check


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether something becomes true within that time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.01)
    return True


@pytest.fixture(name="until")
def _until() -> Callable[..., Any]:
    return until


# Responses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(scripted: Callable[..., Scripted], tmp_path: Path) -> Callable[..., Scripted]:
    """`server(answers, **options)` keeps its responses in the test's folder."""
    return lambda *given, **options: scripted(*given, responses=tmp_path / "kept" / "responses.sqlite", **options)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a response's stream, each under the name of its type, `[DONE]` after the last."""
    *frames, end = text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


@pytest.fixture
def streamed_response() -> Callable[..., Any]:
    """`await streamed_response(server, **fields)` gives the events of a streamed response."""

    async def ask(server: Scripted, **fields: Any) -> list[dict[str, Any]]:
        response = await server.post("/v1/responses", stream=True, **fields)
        assert response.status_code == 200, response.text
        return events_of(response.text)

    return ask


@pytest.fixture(name="events_of")
def _events_of() -> Callable[[str], list[dict[str, Any]]]:
    return events_of


@pytest.fixture(scope="session")
def fits_event(published: dict[str, Any], fits: Callable[[str, Any], None]) -> Callable[[dict[str, Any]], None]:
    """`fits_event(event)` fails unless an event of a response is of the schema that is published for its type."""
    names = {
        schema["properties"]["type"]["enum"][0]: name
        for name, schema in published.items()
        if name.startswith("Response") and name.endswith("Event") and "properties" in schema
    }
    return lambda event: fits(names[event["type"]], event)
