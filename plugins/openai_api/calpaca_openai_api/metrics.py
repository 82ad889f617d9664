"""What Prometheus may read."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from calpaca_openai_api.admission import Admission

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counts and times of one server."""

    def __init__(self, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "calpaca_requests",
            "Requests that were answered.",
            ["path", "model", "key", "status"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "calpaca_prompt_tokens", "Tokens of prompts.", ["model", "key"], registry=self.registry
        )
        self.completion_tokens = Counter(
            "calpaca_completion_tokens", "Tokens of answers.", ["model", "key"], registry=self.registry
        )
        self.first_token = Histogram(
            "calpaca_time_to_first_token_seconds", "From a request to the first piece of its answer.", ["model"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.duration = Histogram(
            "calpaca_request_seconds", "From a request to the end of its answer.", ["path"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        running = Gauge("calpaca_requests_running", "Requests that hold a slot.", registry=self.registry)
        running.set_function(lambda: admission.running)
        waiting = Gauge("calpaca_requests_waiting", "Requests that wait for a slot.", registry=self.registry)
        waiting.set_function(lambda: admission.waiting)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
