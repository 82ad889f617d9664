"""Rows per second from a server on this machine that takes half a second for each reply: one request at a time, and eight.

    python bench/crawl_concurrency.py

Needs the files of plugins/crawl/tests. Prints one JSON object.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_FILE = Path(__file__).parents[1] / "plugins" / "crawl" / "tests" / "test_generator_endpoint.py"
_spec = importlib.util.spec_from_file_location("endpoint", _FILE)
assert _spec is not None and _spec.loader is not None
_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tests)


def seconds(in_flight: int, rows: int = 48, delay: float = 0.5) -> float:
    """The report's own time: without starting Python."""
    with (
        _tests.endpoint(lambda number: (200, _tests.row(number)), delay) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        model = f"http://127.0.0.1:{server.server_port}/v1#m"
        command = ["-m", "calpaca", "crawl", "instructions", "rows.jsonl", "--model", model, "--records", "1", "--json"]
        arguments = [*command, "--max-rows", str(rows), "--in-flight", str(in_flight), "--seed", str(int(time.time()))]
        done = subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout)["seconds"])


def main() -> None:
    serial, eight = seconds(1), seconds(8)
    print(json.dumps({"serial": serial, "eight": eight, "ratio": round(serial / eight, 2)}))


if __name__ == "__main__":
    main()
