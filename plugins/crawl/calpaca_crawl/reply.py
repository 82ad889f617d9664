"""A model's reply, as records: valid JSON as it is, else repaired as far as that goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import json_repair

_LISTS = ("rows", "turns", "data", "records", "items")


def read_records(reply: str) -> list[Mapping[str, Any]]:
    """The objects in a reply: of a list, of an object that holds one, of lines, or of text around them.

    A reply that breaks off gives the objects that are whole enough to read. Empty where there is none.
    """
    start = min((place for place in (reply.find("["), reply.find("{")) if place >= 0), default=-1)
    if start < 0:
        return []
    try:
        return _objects(json_repair.loads(reply[start:]))
    except (ValueError, RecursionError):
        return []


def _objects(value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, list):
        return [found for each in value for found in _objects(each)]
    if not isinstance(value, Mapping) or not value:
        return []
    listed = next((value[name] for name in _LISTS if isinstance(value.get(name), list)), None)
    return [value] if listed is None else _objects(listed)
