"""A server for OpenAI clients: `calpaca serve`."""

from __future__ import annotations

calpaca_api = ">=1,<2"
