"""`python -m calpaca` is the command `calpaca`."""

from __future__ import annotations

import sys

from calpaca.cli.main import main

sys.exit(main())
