"""What Prometheus may read."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from calpaca_openai_api.admission import Admission

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

_SPEEDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


class _States(Collector):
    """Requests that run and wait now, by model and key."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for state, counts in self._admission.by_model.items():
            family = GaugeMetricFamily(
                f"calpaca_model_requests_{state}", f"Requests {state}, by model and key.", labels=["model", "key"]
            )
            for (model, key), count in counts.items():
                family.add_metric([model, key], count)
            yield family


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
        self.speed = Histogram(
            "calpaca_tokens_per_second", "Speed of an answer after its first piece.", ["model"],
            buckets=_SPEEDS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(_States(admission))
        running = Gauge("calpaca_requests_running", "Requests that hold a slot.", registry=self.registry)
        running.set_function(lambda: admission.running)
        waiting = Gauge("calpaca_requests_waiting", "Requests that wait for a slot.", registry=self.registry)
        waiting.set_function(lambda: admission.waiting)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
