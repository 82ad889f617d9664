"""JSON schemas for constrained decoding: closed, so that nothing is made up, and bounded, so that an answer ends.

A language model that is held to a schema still decides how long a text or a list gets; a small one may never stop. A
schema that leaves lengths open is therefore given limits under which a whole answer fits the tokens at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

_LARGEST_INTEGER = 10**18
_SHORTEST_TEXT = 8
_LISTED_TEXT = 16
"""Tokens set aside for a text inside a list when the number of items is decided."""
_NUMBER = 8
_DEEPEST = 8
"""Levels of a schema that are looked at; below that it is left as it is."""


def closed(schema: Schema) -> dict[str, Any]:
    """The schema with objects that allow the properties they name and no others, unless it says otherwise."""
    result = {key: _each_schema(key, value, closed) for key, value in schema.items()}
    if result.get("type") == "object" or "properties" in result:
        result.setdefault("type", "object")
        result.setdefault("properties", {})
        result.setdefault("additionalProperties", False)
    return result


def bounded(schema: Schema, tokens: int) -> dict[str, Any]:
    """The schema with limits where it has none, so that a value takes about `tokens` tokens at most.

    A text gets as many characters as there are tokens for it, since a token is seldom less than a character.
    """
    result = _bounded(schema, tokens, 0)
    for name in ("$defs", "definitions"):
        if name in result:
            result[name] = {key: _bounded(value, tokens // 4, 1) for key, value in result[name].items()}
    return result


def split_definitions(schema: Schema, prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema without its definitions, and these, under names that begin with `prefix`.

    For putting several schemas into one: their definitions go to its root.
    """
    definitions = {**schema.get("definitions", {}), **schema.get("$defs", {})}
    body = {key: value for key, value in schema.items() if key not in {"$defs", "definitions"}}
    renamed = {f"{prefix}.{name}": _point_to(value, prefix) for name, value in definitions.items()}
    moved: dict[str, Any] = _point_to(body, prefix)
    return moved, renamed


def _point_to(value: Any, prefix: str) -> Any:
    """References to definitions as references to the renamed ones."""
    if isinstance(value, list):
        return [_point_to(each, prefix) for each in value]
    if not isinstance(value, Mapping):
        return value
    result = {key: _point_to(each, prefix) for key, each in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith(("#/$defs/", "#/definitions/")):
        result["$ref"] = f"#/$defs/{prefix}.{reference.rpartition('/')[2]}"
    return result


def _each_schema(key: str, value: Any, change: Any) -> Any:
    """`change` applied to every schema under a keyword that holds schemas."""
    if key in {"properties", "$defs", "definitions", "patternProperties"} and isinstance(value, Mapping):
        return {name: change(each) if isinstance(each, Mapping) else each for name, each in value.items()}
    if key in {"anyOf", "oneOf", "allOf", "prefixItems"} and isinstance(value, list):
        return [change(each) if isinstance(each, Mapping) else each for each in value]
    if key in {"items", "additionalProperties"} and isinstance(value, Mapping):
        return change(value)
    return value


def _bounded(schema: Schema, tokens: int, depth: int) -> dict[str, Any]:
    result = dict(schema)
    if depth >= _DEEPEST or not isinstance(schema, Mapping):
        return result
    for key in ("anyOf", "oneOf", "allOf"):
        if key in result:
            result[key] = [_bounded(each, tokens, depth + 1) for each in result[key]]
    kinds = result.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" in kinds:
        _limit_text(result, tokens)
    if "integer" in kinds:
        _limit_integer(result)
    if "array" in kinds and isinstance(result.get("items"), Mapping):
        most = result.setdefault("maxItems", max(result.get("minItems", 0), tokens // _need(result["items"], depth), 1))
        result["items"] = _bounded(result["items"], tokens // max(most, 1), depth + 1)
    if result.get("properties"):
        properties = result["properties"]
        share = (tokens - sum(_key_tokens(name) for name in properties)) // len(properties)
        result["properties"] = {name: _bounded(each, share, depth + 1) for name, each in properties.items()}
    return result


def _limit_text(schema: dict[str, Any], tokens: int) -> None:
    if not {"enum", "const", "pattern", "format", "maxLength"} & schema.keys():
        schema["maxLength"] = max(tokens - 2, schema.get("minLength", 0), _SHORTEST_TEXT)


def _limit_integer(schema: dict[str, Any]) -> None:
    if {"enum", "const"} & schema.keys():
        return
    if not {"maximum", "exclusiveMaximum"} & schema.keys():
        schema["maximum"] = _LARGEST_INTEGER
    if not {"minimum", "exclusiveMinimum"} & schema.keys():
        schema["minimum"] = -_LARGEST_INTEGER


def _need(schema: Schema, depth: int) -> int:
    """Tokens that a value of modest length takes."""
    if depth >= _DEEPEST:
        return _NUMBER
    if schema.get("properties"):
        return sum(_key_tokens(name) + _need(each, depth + 1) for name, each in schema["properties"].items())
    return _LISTED_TEXT if schema.get("type") == "string" else _NUMBER


def _key_tokens(name: str) -> int:
    return len(name) // 2 + 4
