"""Grammars in the dialects of native libraries. What a library would read otherwise than we do is refused by name."""

from __future__ import annotations

import json
import re

from calpaca.core.engine import Grammar
from calpaca.core.errors import UnsupportedError, UsageError

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def lark_source(grammar: Grammar) -> str:
    """The grammar in llguidance's form of Lark, which llama.cpp takes too.

    Raises UsageError for an invalid grammar, UnsupportedError for a schema keyword that cannot be honoured.
    """
    if grammar.kind == "json_schema":
        if isinstance(grammar.value, str):
            raise UsageError("A JSON schema must be a mapping.", "Parse the text first.")
        source = f"start: %json {json.dumps({**grammar.value, 'x-guidance': _JSON_STYLE})}"
    elif grammar.kind == "regex":
        source = f"start: /{_delimited(str(grammar.value))}/"
    else:
        source = str(grammar.value)
    _check(grammar, source)
    return source


def _delimited(pattern: str) -> str:
    """A pattern that can stand between slashes, on one line."""
    escaped = re.sub(r"\\.|/", lambda found: found[0] if found[0] != "/" else r"\/", pattern, flags=re.DOTALL)
    return escaped.replace("\n", "\\n").replace("\r", "\\r")


def _check(grammar: Grammar, source: str) -> None:
    from llguidance import LLMatcher

    reason = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(source))
    if reason:
        first = reason.split("\n")[0]
        kind = UnsupportedError if "nimplemented" in reason or "not supported" in reason else UsageError
        raise kind(f"This {grammar.kind.replace('_', ' ')} cannot be used: {first}", "Simplify it.")


_LOOSE = re.compile(r"\\[WDSbBAzpPQEk1-9]|\(\?(?!:)|\[\[:|&&|[*+?}]\+")
"""In a pattern without escaped backslashes: what xgrammar reads more loosely than others do, or not at all."""


def xgrammar_regex(grammar: Grammar) -> str:
    """A regular expression that xgrammar, OpenVINO's library for this, reads as everyone does. Raises as above."""
    lark_source(grammar)
    pattern = str(grammar.value)
    found = _LOOSE.search(pattern.replace(r"\\", "  "))
    if found is not None:
        raise UnsupportedError(
            f"The engine 'openvino' does not support '{found[0]}' in a regex.",
            "Use --engine transformers or llama_cpp.",
        )
    return pattern
