"""schemathesis: many odd requests by OpenAI's published schemas; none may end in a 5xx or in another shape."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("schemathesis", reason="schemathesis is not installed: make check-api")

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
REFUSALS = ("400", "401", "403", "404", "405", "409", "413", "415", "429", "503")

POSTS = {
    "/chat/completions": ("CreateChatCompletionRequest", "CreateChatCompletionResponse"),
    "/completions": ("CreateCompletionRequest", "CreateCompletionResponse"),
    "/embeddings": ("CreateEmbeddingRequest", "CreateEmbeddingResponse"),
    "/responses": ("CreateResponse", "Response"),
}
DELETED = {"type": "object", "required": ["id", "object", "deleted"]}
TAKEN = {
    "/chat/completions": (
        "messages model max_tokens temperature top_p n stop seed stream logprobs user metadata store "
        "frequency_penalty presence_penalty parallel_tool_calls"
    ),
    "/completions": "prompt model max_tokens temperature top_p n stop seed stream logprobs echo user",
    "/embeddings": "input model encoding_format user",
    "/responses": (
        "input model max_output_tokens instructions temperature top_p stream store background truncation metadata "
        "parallel_tool_calls"
    ),
}
"""Fields whose every value of the published type is answered, so that answers are seen and not only refusals."""

TEXT = {"type": "string", "minLength": 1, "maxLength": 40}

MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": 4,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "additionalProperties": False,
        "properties": {
            "role": {"enum": ["system", "user", "assistant"]},
            "content": TEXT,
        },
    },
}
INPUTS = {"messages": MESSAGES, "input": TEXT, "prompt": TEXT}
KEPT = {
    "/responses/{id}": {"get": "Response", "delete": DELETED},
    "/responses/{id}/cancel": {"post": "Response"},
    "/responses/{id}/input_items": {"get": "ResponseItemList"},
}


def answers(schema: str | dict[str, object], *, streamed: bool = False) -> dict[str, object]:
    refused = {"description": "refused", "content": {"application/json": {"schema": ref("ErrorResponse")}}}
    given: dict[str, object] = {"application/json": {"schema": ref(schema) if isinstance(schema, str) else schema}}
    content = {**given, "text/event-stream": {}} if streamed else given
    return {"200": {"description": "answered", "content": content}, **dict.fromkeys(REFUSALS, refused)}


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def properties_of(schema: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    """The property lists of a schema and of those that it is all of."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    own = [schema["properties"]] if "properties" in schema else []
    return own + [found for part in schema.get("allOf", ()) for found in properties_of(part, schemas)]


def taken(schema: dict[str, Any], schemas: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """A request with no other fields than these."""
    known = {name: value for found in properties_of(schema, schemas) for name, value in found.items()}
    properties = {name: INPUTS.get(name, known[name]) for name in names}
    required = [name for name in names if name in {"messages", "input", "prompt", "model"} or name.startswith("max_")]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def description(published: dict[str, Any], target, *, odd: bool) -> dict[str, object]:
    """Our paths with the published schemas: the model is ours, answers are short, floats are no base64."""
    schemas = undiscriminated(published)
    for path, (request, _) in POSTS.items():
        for properties in properties_of(schemas[request], schemas):
            short = {
                "model": {"const": "multilingual-e5-small" if path == "/embeddings" else target.model},
                "max_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
                "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
                "max_output_tokens": {"type": "integer", "minimum": 16, "maximum": 20},
                "n": {"type": "integer", "minimum": 1, "maximum": 2},
                "best_of": {"type": "integer", "minimum": 1, "maximum": 2},
                "encoding_format": {"const": "float"},
            }
            properties.update({name: value for name, value in short.items() if name in properties})
        if path != "/embeddings":
            most = "max_output_tokens" if path == "/responses" else "max_tokens"
            schemas[request].setdefault("required", []).append(most)
        if not odd:
            schemas[request] = taken(schemas[request], schemas, TAKEN[path].split())
    paths: dict[str, object] = {"/models": {"get": {"responses": answers("ListModelsResponse")}}}
    parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/models/{model}"] = {"get": {"parameters": [parameter], "responses": answers("Model")}}
    for path, (request, response) in POSTS.items():
        body = {"required": True, "content": {"application/json": {"schema": ref(request)}}}
        responses = answers(response, streamed=path != "/embeddings")
        paths[path] = {"post": {"requestBody": body, "responses": responses}}
    parameter = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    for path, methods in KEPT.items():
        paths[path] = {each: {"parameters": [parameter], "responses": answers(form)} for each, form in methods.items()}
    info = {"title": "OpenAI's API, cut to calpaca's paths", "version": "1"}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def undiscriminated(schema: Any) -> Any:
    """Without discriminators: those that are published name no values, and the values are not the schemas' names."""
    if isinstance(schema, list):
        return [undiscriminated(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: undiscriminated(each) for key, each in schema.items() if key != "discriminator"}


@pytest.mark.parametrize("kind", ["odd", "taken"])
def test_requests_get_the_published_answers(target, published, tmp_path, kind):
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(description(published, target, odd=kind == "odd")))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", target.url, "--checks", CHECKS]
    command += ["--phases", "examples,fuzzing", "--max-examples", "30", "--seed", "20261124", "--no-color"]
    command += ["--mode", "all" if kind == "odd" else "positive"]
    command += ["--request-timeout", "60", "--suppress-health-check", "all"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
