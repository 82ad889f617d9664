"""Sizes on the command line: `5GB`, `500MB`, `2GiB` or bytes."""

from __future__ import annotations

import re

import click

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", re.IGNORECASE)


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None or not float(match[1]):
            self.fail(f"'{value}' is no size; write it as 5GB, 500MB or 2GiB.", param, ctx)
        return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


SIZE = _Size()
"""Bytes, from a number with a unit: of 10^3 (`KB`, `MB`, `GB`) or of 2^10 (`KiB`, `MiB`, `GiB`)."""
