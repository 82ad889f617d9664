"""schemathesis: many odd requests by OpenAI's published schemas; none may end in a 5xx or in another shape."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed: make check-api")

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
REFUSALS = ("400", "401", "403", "404", "405", "413", "415", "429", "503")

POSTS = {
    "/chat/completions": ("CreateChatCompletionRequest", "CreateChatCompletionResponse"),
    "/completions": ("CreateCompletionRequest", "CreateCompletionResponse"),
    "/embeddings": ("CreateEmbeddingRequest", "CreateEmbeddingResponse"),
}


def answers(schema: str, *, streamed: bool = False) -> dict[str, object]:
    refused = {"description": "refused", "content": {"application/json": {"schema": ref("ErrorResponse")}}}
    given: dict[str, object] = {"application/json": {"schema": ref(schema)}}
    content = {**given, "text/event-stream": {}} if streamed else given
    return {"200": {"description": "answered", "content": content}, **dict.fromkeys(REFUSALS, refused)}


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def properties_of(schema: dict[str, object]) -> list[dict[str, object]]:
    """The property lists of a schema and of those that it is all of."""
    own = [schema["properties"]] if "properties" in schema else []
    return own + [found for part in schema.get("allOf", ()) for found in properties_of(part)]


def description(published: dict[str, object], target) -> dict[str, object]:
    """Our paths with the published schemas: the model is ours, answers are short, floats are no base64."""
    schemas = copy.deepcopy(published)
    models = {"chat": target.model, "text": target.model, "vectors": "multilingual-e5-small"}
    for (request, _), model in zip(POSTS.values(), models.values(), strict=True):
        for properties in properties_of(schemas[request]):
            short = {
                "model": {"const": model},
                "max_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
                "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
                "n": {"type": "integer", "minimum": 1, "maximum": 2},
                "best_of": {"type": "integer", "minimum": 1, "maximum": 2},
                "encoding_format": {"const": "float"},
            }
            properties.update({name: value for name, value in short.items() if name in properties})
        if request != "CreateEmbeddingRequest":
            schemas[request].setdefault("required", []).append("max_tokens")
    paths: dict[str, object] = {"/models": {"get": {"responses": answers("ListModelsResponse")}}}
    parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/models/{model}"] = {"get": {"parameters": [parameter], "responses": answers("Model")}}
    for path, (request, response) in POSTS.items():
        body = {"required": True, "content": {"application/json": {"schema": ref(request)}}}
        responses = answers(response, streamed=path != "/embeddings")
        paths[path] = {"post": {"requestBody": body, "responses": responses}}
    info = {"title": "OpenAI's API, cut to calpaca's paths", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def test_odd_requests_get_the_published_answers(target, published, tmp_path):
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(description(published, target)))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", target.url, "--checks", CHECKS]
    command += ["--phases", "examples,fuzzing", "--max-examples", "30", "--seed", "20261124", "--no-color"]
    command += ["--request-timeout", "60", "--suppress-health-check", "all"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
