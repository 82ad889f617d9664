"""`python -m calpaca` is the command `calpaca`."""

from __future__ import annotations

from calpaca.cli.main import start

start()
