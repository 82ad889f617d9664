"""Schemas for constrained decoding: closed and bounded."""

import jsonschema
import pytest
from pydantic import BaseModel

from calpaca.core.json_schema import bounded, closed, split_definitions


def test_objects_allow_what_they_name_and_nothing_else():
    schema = {"properties": {"a": {"type": "object"}, "b": {"anyOf": [{"type": "object", "properties": {}}]}}}
    assert closed(schema) == {
        "type": "object",
        "properties": {
            "a": {"type": "object", "properties": {}, "additionalProperties": False},
            "b": {"anyOf": [{"type": "object", "properties": {}, "additionalProperties": False}]},
        },
        "additionalProperties": False,
    }


def test_an_object_that_says_it_is_open_stays_open():
    assert closed({"type": "object", "additionalProperties": True})["additionalProperties"] is True
    assert closed({"type": "object", "additionalProperties": {"type": "object"}})["additionalProperties"] == {
        "type": "object", "properties": {}, "additionalProperties": False,
    }  # fmt: skip


def test_what_is_open_gets_limits_and_what_is_not_is_left_alone():
    assert bounded({"type": "string"}, 100)["maxLength"] == 98
    assert bounded({"type": ["string", "null"]}, 100)["maxLength"] == 98
    for schema in (
        {"type": "string", "maxLength": 5000},
        {"enum": ["a"]},
        {"type": "string", "pattern": "a+"},
        {"type": "boolean"},
    ):
        assert bounded(schema, 100) == schema
    assert bounded({"type": "integer", "minimum": 0}, 100) == {"type": "integer", "minimum": 0, "maximum": 10**18}
    assert bounded({"type": "integer", "exclusiveMaximum": 9}, 100)["minimum"] == -(10**18)


def test_limits_respect_what_a_schema_demands():
    assert bounded({"type": "string", "minLength": 300}, 100)["maxLength"] == 300
    assert bounded({"type": "array", "items": {"type": "string"}, "minItems": 50}, 100)["maxItems"] == 50


@pytest.mark.parametrize("tokens", [100, 512, 4000])
def test_the_longest_value_fits_the_tokens(tokens):
    schema = bounded(
        {
            "type": "object",
            "properties": {
                "title": {"type": "string"},
                "points": {"type": "array", "items": {"type": "object", "properties": {"text": {"type": "string"}}}},
            },
        },
        tokens,
    )
    points = schema["properties"]["points"]
    longest = schema["properties"]["title"]["maxLength"]
    longest += points["maxItems"] * (points["items"]["properties"]["text"]["maxLength"] + 6)
    assert longest <= tokens


def test_definitions_are_bounded_and_recursion_ends():
    class Node(BaseModel):
        text: str
        children: list["Node"]

    schema = bounded(closed(Node.model_json_schema()), 400)
    assert schema["$defs"]["Node"]["properties"]["text"]["maxLength"] < 100
    jsonschema.validate({"text": "a", "children": [{"text": "b", "children": []}]}, schema)


def test_definitions_of_several_schemas_do_not_clash():
    def schema(kind):
        return {"$ref": "#/$defs/X", "$defs": {"X": {"type": kind, "items": {"$ref": "#/$defs/X"}}}}

    parts = [split_definitions(schema(kind), name) for name, kind in (("f", "array"), ("g", "string"))]
    assert [body["$ref"] for body, _ in parts] == ["#/$defs/f.X", "#/$defs/g.X"]
    assert parts[0][1] == {"f.X": {"type": "array", "items": {"$ref": "#/$defs/f.X"}}}
