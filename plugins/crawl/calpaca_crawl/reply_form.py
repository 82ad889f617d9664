"""What replies must look like: an example for the prompt, and a schema for engines that can be held to one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from calpaca.core.language import Language

_CHARACTERS = {"en": 3.5, "zh": 1.0}
"""Of a token, at the least: a text that has its longest length still fits the tokens of the reply."""
_SHARES = {"instruction": 0.2, "input": 0.25, "question": 0.2, "quote": 0.3, "user": 0.3}
_MARKS = 24
"""Tokens of a record that are names and punctuation."""


class ReplyForm:
    """Lists of objects of texts, named `fields`, `count` of them in `tokens` tokens."""

    def __init__(self, name: str, fields: tuple[str, ...], count: int, tokens: int, language: Language) -> None:
        self.name = name
        self.fields = fields
        self.count = count
        self._characters = int(max(tokens / count - _MARKS, 8 * len(fields)) * _CHARACTERS[language])

    @property
    def example(self) -> str:
        """As it is shown in a prompt."""
        return json.dumps({self.name: [dict.fromkeys(self.fields, "…"), "…"]}, ensure_ascii=False).replace('"…"]', "…]")

    @property
    def schema(self) -> Mapping[str, Any]:
        texts = {name: self._text(name) for name in self.fields}
        record = {"type": "object", "properties": texts, "required": list(texts), "additionalProperties": False}
        rows = {"type": "array", "items": record, "minItems": self.count, "maxItems": self.count}
        return {
            "type": "object", "properties": {self.name: rows}, "required": [self.name], "additionalProperties": False,
        }  # fmt: skip

    def _text(self, name: str) -> Mapping[str, Any]:
        rest = 1.0 - sum(_SHARES.get(each, 0.0) for each in self.fields)
        longest = int(self._characters * _SHARES.get(name, rest))
        return {"type": "string", "minLength": 0 if name == "input" else 2, "maxLength": max(longest, 8)}
