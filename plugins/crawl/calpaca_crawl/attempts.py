"""Requests that were sent, noted before they are: what a failed or killed one may have cost is known to later runs too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from calpaca.core.engine import Usage
from calpaca.core.jobs import Ledger, step_key

KIND = "crawl_attempt"
_AT_ONCE = 500


class Attempts:
    """The requests of one pool, in the order in which they were sent, in the job ledger."""

    def __init__(self, ledger: Ledger, pool: str) -> None:
        self._ledger = ledger
        self._pool = pool
        self._earlier = list(self._read())
        self._count = len(self._earlier)

    def note(self, request: str, most: Usage) -> None:
        """A request, by the key of its reply, is about to be sent; it takes so many tokens at its most."""
        sent = json.dumps([request, most.prompt_tokens, most.completion_tokens])
        self._ledger.put_many(KIND, {self._key(self._count): sent.encode()})
        self._count += 1

    def lost(self) -> list[Usage]:
        """What requests of earlier runs may have taken that brought no reply."""
        replies = self._ledger.get_many(list({request for request, _ in self._earlier}))
        answered = Counter(dict.fromkeys(replies, 1))
        found = []
        for request, most in self._earlier:
            if answered[request]:
                answered[request] -= 1
            else:
                found.append(most)
        return found

    def _read(self) -> Iterator[tuple[str, Usage]]:
        start = 0
        while True:
            keys = [self._key(number) for number in range(start, start + _AT_ONCE)]
            notes = self._ledger.get_many(keys)
            for key in filter(notes.__contains__, keys):
                request, prompt, new = json.loads(notes[key])
                yield request, Usage(prompt, new)
            if len(notes) < _AT_ONCE:
                return
            start += _AT_ONCE

    def _key(self, number: int) -> str:
        return step_key(KIND, pool=self._pool, number=number)
