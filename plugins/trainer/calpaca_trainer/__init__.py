"""Training: `calpaca train`."""

from __future__ import annotations

calpaca_api = ">=1,<2"
