"""How much a key may ask in a minute: two token buckets, one of requests and one of tokens, that refill all the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from calpaca_openai_api.faults import ApiError, busy
from calpaca_openai_api.settings import KeySettings


@dataclass
class Bucket:
    """Holds at most `limit`, and gains that much in a minute. It may be overdrawn: what an answer costs is known when it
    ends."""

    limit: int
    clock: Callable[[], float] = time.monotonic
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = float(self.limit)
        self._seen = self.clock()

    def refill(self) -> None:
        now = self.clock()
        self.level = min(float(self.limit), self.level + (now - self._seen) * self.limit / 60.0)
        self._seen = now

    def seconds_until(self, level: float) -> float:
        """Until it holds that much again."""
        return max(0.0, (level - self.level) * 60.0 / self.limit)

    def headers(self, unit: str) -> dict[str, str]:
        """What it holds, as OpenAI's servers tell it."""
        return {
            f"x-ratelimit-limit-{unit}": str(self.limit),
            f"x-ratelimit-remaining-{unit}": str(max(0, math.floor(self.level))),
            f"x-ratelimit-reset-{unit}": f"{self.seconds_until(self.limit):.3f}s",
        }


class Rates:
    """The buckets of each key that has a limit. All calls come from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def enter(self, name: str, key: KeySettings | None) -> dict[str, str]:
        """Count a request, and give the headers of its response. Raises ApiError 429 with the time to wait."""
        buckets = dict(self._limited(name, key))
        for bucket in buckets.values():
            bucket.refill()
        headers = {header: value for unit, bucket in buckets.items() for header, value in bucket.headers(unit).items()}
        for unit, bucket in buckets.items():
            if bucket.level < 1:
                raise _too_many(unit, bucket, headers)
        if "requests" in buckets:
            buckets["requests"].level -= 1
            headers |= buckets["requests"].headers("requests")
        return headers

    def spend(self, name: str, key: KeySettings | None, tokens: int) -> None:
        """Count the tokens of a request that has ended."""
        for unit, bucket in self._limited(name, key):
            if unit == "tokens":
                bucket.refill()
                bucket.level -= tokens

    def _limited(self, name: str, key: KeySettings | None) -> Iterator[tuple[str, Bucket]]:
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute} if key is not None else {}
        for unit, limit in limits.items():
            if limit is not None:
                yield unit, self._buckets.setdefault((name, unit), Bucket(limit, self._clock))


def _too_many(unit: str, bucket: Bucket, headers: dict[str, str]) -> ApiError:
    seconds = max(1, math.ceil(bucket.seconds_until(1)))
    message = f"This key may use {bucket.limit} {unit} a minute; try again in {seconds} s."
    fault = busy(message, status=429, code="rate_limit_exceeded", seconds=seconds)
    fault.headers |= headers
    return fault
