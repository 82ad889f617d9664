"""Grammars as native libraries take them: schemas as EBNF, and what is refused rather than read otherwise."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest

from calpaca.core.engine import Grammar
from calpaca.core.engines.dialect import lark_source, xgrammar_regex
from calpaca.core.engines.schema_grammar import _integer, schema_ebnf
from calpaca.core.errors import UnsupportedError, UsageError

pytest.importorskip("llguidance")


def as_regex(expression: str) -> re.Pattern[str]:
    """An EBNF expression of digits and ranges as Python reads it."""
    return re.compile(re.sub(r"\s+", "", expression).replace('"', ""))


def test_integers_are_bounded_exactly() -> None:
    lows = (None, -1000, -130, -109, -11, -10, -1, 0, 1, 9, 10, 37, 99, 100, 999)
    highs = (None, -101, -100, -10, -1, 0, 1, 8, 10, 19, 99, 100, 101, 1099, 1500)
    for low, high in product(lows, highs):
        if low is not None and high is not None and low > high:
            continue
        bounds = {"minimum": low, "maximum": high}
        pattern = as_regex(_integer({name: bound for name, bound in bounds.items() if bound is not None}))
        for number in range(-1600, 1700):
            within = (low is None or number >= low) and (high is None or number <= high)
            assert bool(pattern.fullmatch(str(number))) is within, (low, high, number)
        assert not any(pattern.fullmatch(text) for text in ("", "-", "-0", "007", "01"))


def test_excluded_bounds_and_fractions_count() -> None:
    pattern = as_regex(_integer({"exclusiveMinimum": 2, "exclusiveMaximum": 7.5, "maximum": 6.9}))
    assert [number for number in range(12) if pattern.fullmatch(str(number))] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "string", "pattern": "a+"}, "pattern"),
        ({"type": "string", "format": "date"}, "format"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "null"}]}, "oneOf"),
        ({"type": "number", "minimum": 1}, "minimum"),
        ({"type": "integer", "multipleOf": 3}, "multipleOf"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"anyOf": [{"type": "null"}], "not": {}}, "not"),
        ({"properties": {"a": {"allOf": [{"type": "null"}]}}}, "allOf"),
    ],
)
def test_a_keyword_that_cannot_be_honoured_is_refused_by_name(schema: dict[str, Any], keyword: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{keyword}'"):
        schema_ebnf(schema)


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, "{}"])
def test_what_is_no_schema_is_an_error(schema: Any) -> None:
    with pytest.raises(UsageError):
        schema_ebnf(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "array", "minItems": 3, "maxItems": 2},
        {"enum": ["a"], "type": "integer"},
        {"type": "array", "items": False, "minItems": 1},
        False,
    ],
)
def test_a_schema_that_no_value_fits_is_an_error(schema: Any) -> None:
    with pytest.raises((UnsupportedError, UsageError)):
        schema_ebnf({"type": "object", "properties": {"a": schema}, "required": ["a"]})


def test_a_definition_may_contain_itself() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    grammar = schema_ebnf({"$ref": "#/$defs/node", "$defs": {"node": node}})
    assert grammar.count("definition0 ::=") == 1


@pytest.mark.parametrize("pattern", [r"\W", r"a(?=b)", r"(?i)a", r"\bword\b", r"(a)\1", r"[[:alpha:]]"])
def test_a_regex_that_openvino_reads_otherwise_is_refused(pattern: str) -> None:
    with pytest.raises((UnsupportedError, UsageError)):
        xgrammar_regex(Grammar("regex", pattern))


@pytest.mark.parametrize("pattern", ["(yes|no)!", r"\d{3}-[a-z]+", r"\\W", "a/b\nc"])
def test_an_ordinary_regex_is_kept(pattern: str) -> None:
    assert xgrammar_regex(Grammar("regex", pattern)) == pattern


@pytest.mark.parametrize(
    "grammar",
    [Grammar("regex", "(unclosed"), Grammar("json_schema", {"type": "nonsense"}), Grammar("lark", "start: nothing")],
)
def test_a_grammar_that_cannot_be_read_is_an_error(grammar: Grammar) -> None:
    with pytest.raises((UsageError, UnsupportedError)):
        lark_source(grammar)
