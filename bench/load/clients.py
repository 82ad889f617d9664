"""Clients for locust: each asks one question after another and reads the answer as it streams.

What they saw goes to the file named by LOAD_REPORT. Run by `python bench/load`.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from locust import HttpUser, events, task

TOKENS = int(os.environ.get("LOAD_TOKENS", "32"))
NUMBERS = itertools.count()
SEEN: dict[str, list[float]] = {"tokens": [], "first": [], "gaps": [], "totals": []}
"""When each token came, and seconds to a first token, between two tokens, and of whole answers."""


class Reader(HttpUser):
    """One client."""

    @task
    def ask(self) -> None:
        text = f"Question {next(NUMBERS)}: how do llamas and alpacas differ? Tell all that you know."
        fields: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": TOKENS}
        fields |= {"model": "smollm2-135m-instruct", "temperature": 0, "stream": True}
        fields["logit_bias"] = {"0": -100, "2": -100}  # the tokens that end an answer: all are of the same length
        begin = time.perf_counter()
        with self.client.post("/v1/chat/completions", json=fields, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            times = self._read(response)
            if len(times) < 2:
                response.failure("no answer")
                return
        SEEN["first"].append(times[0] - begin)
        SEEN["gaps"] += [after - before for before, after in pairwise(times)]
        SEEN["totals"].append(times[-1] - begin)

    def _read(self, response: Any) -> list[float]:
        """When each piece of text came."""
        times = []
        for line in response.iter_lines():
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
                SEEN["tokens"].append(times[-1])
        return times


@events.quitting.add_listener
def write_report(environment: Any, **_: object) -> None:
    report = {**SEEN, "failures": environment.stats.total.num_failures}
    Path(os.environ["LOAD_REPORT"]).write_text(json.dumps(report))
