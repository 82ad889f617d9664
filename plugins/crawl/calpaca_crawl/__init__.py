"""Instruction data and corpora from the web: `calpaca crawl`."""

from __future__ import annotations

calpaca_api = ">=1,<2"
