"""JSON schemas as EBNF, for OpenVINO: its own reading of a schema ignores keywords that it does not know, and lets a
small model lose itself in white space.

What a grammar allows is valid under the schema; some of what the schema allows is left out: other orders of properties,
properties that are not named, other ways to write a text. A keyword that cannot be honoured is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from calpaca.core.errors import UnsupportedError, UsageError

_ANNOTATIONS = frozenset({
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples",
    "readOnly", "title", "writeOnly",
})  # fmt: skip
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": set[str](),
    "boolean": set[str](),
    "null": set[str](),
}
_LEXICON = {
    "character": r'[^"\\\x00-\x1f] | "\\" ["\\/bfnrt]',
    "text": r'"\"" character* "\""',
    "number": r'"-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [+\-]? [0-9]+)?',
    "any": r'text | number | "true" | "false" | "null" | "[]" | "[" any (", " any)* "]"'
    r' | "{}" | "{" text ": " any (", " text ": " any)* "}"',
}
_EMPTY = '""'


def schema_ebnf(schema: Mapping[str, Any] | str) -> str:
    """A grammar whose texts are JSON values of `schema`. Raises UsageError for what is no schema, UnsupportedError for
    a keyword that cannot be honoured."""
    from jsonschema import Draft202012Validator, SchemaError

    if isinstance(schema, str):
        raise UsageError("A JSON schema must be a mapping.", "Parse the text first.")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise UsageError(f"This is no JSON schema: {error.message}", "See https://json-schema.org.") from error
    rules = _Rules(schema)
    rules.add("root", rules.value(schema))
    return "".join(f"{name} ::= {body}\n" for name, body in {**rules.bodies, **_LEXICON}.items())


class _Rules:
    """The rules of a grammar, as they are needed."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self.bodies: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._kinds: dict[str, Callable[[Mapping[str, Any]], str]] = {
            "object": self._object,
            "array": self._array,
            "string": _text,
            "integer": _integer,
            "number": lambda _: "number",
            "boolean": lambda _: '("true" | "false")',
            "null": lambda _: '"null"',
        }

    def add(self, name: str, body: str) -> str:
        self.bodies[name] = body
        return name

    def value(self, schema: Mapping[str, Any] | bool) -> str:
        """What stands for a value of a schema in a rule."""
        if schema is False:
            raise UnsupportedError("A JSON schema that allows no value at all cannot be used.", "Leave it out.")
        if schema is True or not schema.keys() - _ANNOTATIONS:
            return "any"
        keys = schema.keys() - _ANNOTATIONS
        if "$ref" in keys:
            return self._only(schema, "$ref", self._reference)
        if "anyOf" in keys:
            return self._only(schema, "anyOf", lambda options: _either(self.value(each) for each in options))
        if "const" in keys or "enum" in keys:
            return _listed(schema, keys)
        return self._typed(schema, keys)

    def _only(self, schema: Mapping[str, Any], keyword: str, make: Callable[[Any], str]) -> str:
        _refuse(schema.keys() - _ANNOTATIONS - {keyword}, f"beside '{keyword}' ")
        return make(schema[keyword])

    def _typed(self, schema: Mapping[str, Any], keys: set[str]) -> str:
        named = schema.get("type") or [kind for kind, known in _KEYWORDS.items() if keys & known][:1]
        kinds: list[str] = [named] if isinstance(named, str) else list(named)
        _refuse(keys - {"type"}.union(*(_KEYWORDS[kind] for kind in kinds)))
        return _either(self._kinds[kind](schema) for kind in kinds)

    def _reference(self, pointer: str) -> str:
        """A rule of its own, since a definition may contain itself."""
        if pointer not in self._references:
            name = self._references[pointer] = f"definition{len(self._references)}"
            self.add(name, self.value(self._find(pointer)))
        return self._references[pointer]

    def _find(self, pointer: str) -> Any:
        place: Any = self._root
        for step in pointer.removeprefix("#").split("/")[1:]:
            try:
                place = place[step.replace("~1", "/").replace("~0", "~")]
            except (KeyError, TypeError):
                place = None
        if not pointer.startswith("#") or place is None:
            raise UsageError(f"The JSON schema refers to {pointer}, which is not in it.", "Correct the $ref.")
        return place

    def _array(self, schema: Mapping[str, Any]) -> str:
        first = [self.value(each) for each in schema.get("prefixItems", [])]
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        further = schema.get("items", True)
        if further is False:
            most = min(len(first), len(first) if most is None else most)
        if most is not None and least > most:
            raise UnsupportedError(f"A JSON array of {least} to {most} items cannot be.", "Correct the schema.")
        places = first if most is None else first[:most]
        item = self.value(further) if most is None or most > len(first) else ""
        return f'"[" {_items(places, item, least, most)} "]"'

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties: dict[str, Any] = dict(schema.get("properties", {}))
        required = set(schema.get("required", ()))
        properties.update(dict.fromkeys(sorted(required - properties.keys()), True))
        further = schema.get("additionalProperties", False)
        if not properties and isinstance(further, Mapping):
            pair = f'text ": " {self.value(further)}'
            return f'"{{" ({pair} (", " {pair})*)? "}}"'
        pairs = [
            (f"{_literal(_json(name) + ': ')} {self.value(each)}", name in required)
            for name, each in properties.items()
        ]
        return f'"{{" {self._pairs(pairs)} "}}"'

    def _pairs(self, pairs: list[tuple[str, bool]]) -> str:
        """Properties in their order; a comma stands before each but the first of those that are there."""
        opening = following = _EMPTY
        for pair, required in reversed(pairs):
            after_none = f"{pair} {following}" if required else f"{pair} {following} | {opening}"
            after_some = f'", " {pair} {following}' if required else f'", " {pair} {following} | {following}'
            opening = self.add(f"rest{len(self.bodies)}", after_none)
            following = self.add(f"rest{len(self.bodies)}", after_some)
        return opening


def _items(first: list[str], item: str, least: int, most: int | None) -> str:
    """`first` in their places, then any number of `item` (empty for none), `least` to `most` in all."""
    if not first:
        if not item:
            return _EMPTY
        first = [item]
    rest = ""
    if item and most != len(first):
        rest = f'(", " {item}){{{max(least - len(first), 0)},{"" if most is None else most - len(first)}}}'
    for number in range(len(first) - 1, 0, -1):
        rest = f'", " {first[number]} {rest}'
        rest = rest if number < least else f"({rest})?"
    body = f"{first[0]} {rest}"
    return body if least else f"({body})?"


def _refuse(keywords: Iterable[str], where: str = "") -> None:
    for keyword in sorted(keywords):
        raise UnsupportedError(
            f"The engine 'openvino' does not support '{keyword}' {where}in a JSON schema.",
            "Leave it out, or use --engine transformers or llama_cpp.",
        )


def _either(options: Iterable[str]) -> str:
    listed = list(options)
    return listed[0] if len(listed) == 1 else f"({' | '.join(listed)})"


def _literal(text: str) -> str:
    """A text as it stands."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _listed(schema: Mapping[str, Any], keys: set[str]) -> str:
    """One of the values that are listed, where their type is allowed as well."""
    from jsonschema import Draft202012Validator

    _refuse(keys - {"const", "enum", "type"}, "beside a list of values ")
    listed = schema["enum"] if "enum" in keys else [schema["const"]]
    valid = [value for value in listed if Draft202012Validator(dict(schema)).is_valid(value)]
    if not valid:
        raise UnsupportedError("A JSON schema whose values are all ruled out cannot be used.", "Correct it.")
    return _either(_literal(_json(value)) for value in valid)


def _text(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not least and most is None:
        return "text"
    return rf'"\"" character{{{least},{"" if most is None else most}}} "\""'


def _integer(schema: Mapping[str, Any]) -> str:
    low = max(_limits(schema, "minimum", 1), default=None)
    high = min(_limits(schema, "maximum", -1), default=None)
    if low is not None and high is not None and low > high:
        raise UnsupportedError(f"There is no integer from {low} to {high}.", "Correct the JSON schema.")
    parts = []
    if low is None or low < 0:
        shortest = 1 if high is None else max(-high, 1)
        parts.append(f'"-" {digits(shortest, None if low is None else -low)}')
    if high is None or high >= 0:
        parts.append(digits(max(low or 0, 0), high))
    return _either(parts)


def _limits(schema: Mapping[str, Any], name: str, step: int) -> list[int]:
    """The bounds of an integer, both kinds; `step` leads from an excluded one to the next allowed."""
    import math

    towards = math.ceil if step > 0 else math.floor
    within = [towards(schema[name])] if name in schema else []
    beyond = f"exclusive{name.capitalize()}"
    if beyond in schema:
        bound = schema[beyond]
        within.append(int(bound) + step if int(bound) == bound else towards(bound))
    return within


def digits(low: int, high: int | None) -> str:
    """The integers from `low` (0 or more) to `high`, without a sign or zeros before them."""
    if high is None:
        length = len(str(low))
        longer = f"[1-9] [0-9]{{{length},}}"
        return _either([digits(low, 10**length - 1), longer])
    parts, start = [], low
    while start <= high:
        end = min(high, 10 ** len(str(start)) - 1)
        parts += _between(str(start), str(end))
        start = end + 1
    return _either(parts)


def _between(low: str, high: str) -> list[str]:
    """The numbers from `low` to `high`, which have the same length, digit by digit."""
    if low == high:
        return [_literal(low)] if low else [""]
    if low[0] == high[0]:
        return [f'"{low[0]}" {rest}'.strip() for rest in _between(low[1:], high[1:])]
    further = len(low) - 1
    first, last, parts = int(low[0]), int(high[0]), list[str]()
    if low[1:].strip("0"):
        parts += [f'"{first}" {rest}' for rest in _between(low[1:], "9" * further)]
        first += 1
    upper: list[str] = []
    if high[1:].strip("9"):
        upper = [f'"{last}" {rest}' for rest in _between("0" * further, high[1:])]
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}]" + (f" [0-9]{{{further}}}" if further else ""))
    return parts + upper
