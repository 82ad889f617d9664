"""How often each request was sent. It is noted before it is, so that what a failed or killed one may have cost is known."""

from __future__ import annotations

from calpaca.core.jobs import Ledger, step_key

KIND = "crawl_attempt"
_AT_ONCE = 16


class Attempts:
    """Notes in the job ledger, by the keys of requests."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def of(self, request: str) -> int:
        """How often a request was sent, in this run and in earlier ones."""
        count = 0
        while True:
            keys = [_key(request, count + place) for place in range(_AT_ONCE)]
            found = self._ledger.get_many(keys)
            count += len(found)
            if len(found) < _AT_ONCE:
                return count

    def note(self, request: str, before: int) -> None:
        """The request is about to be sent, for the time `before` + 1."""
        self._ledger.put_many(KIND, {_key(request, before): b""})


def _key(request: str, number: int) -> str:
    return step_key(KIND, request=request, number=number)
