"""A model that says how good a row is, from 1 to 5, as an LLM judge (Zheng et al. 2023, https://arxiv.org/abs/2306.05685)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from calpaca.core.engine import Handle, Sampling, Usage
from calpaca.core.errors import CalpacaError
from calpaca.core.jobs import Ledger, step_key
from calpaca_crawl.attempts import Attempts
from calpaca_crawl.budget import Spending
from calpaca_crawl.generator import Generator
from calpaca_crawl.prompts import Prompts
from calpaca_crawl.row import Row
from calpaca_crawl.task import Draft, Record, Refused, Task

KIND = "crawl_score"
_SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "enum": [1, 2, 3, 4, 5]}},
    "required": ["score"],
    "additionalProperties": False,
}
_SAMPLING = Sampling(temperature=0.0, max_new_tokens=24)
_NONE = 0
"""What the ledger keeps of a reply that holds no score."""
_SCORE = re.compile(r"(?<![\d.])[1-5](?![\d.])")


@dataclass
class Scorer:
    """Scores that were given are in the job ledger and are not asked for again; all of them count in the spending."""

    generator: Generator
    prompts: Prompts
    least: int
    ledger: Ledger
    spending: Spending
    attempts: Attempts

    @property
    def name(self) -> str:
        return self.generator.model.name

    def scores(self, rows: Sequence[Row]) -> list[int | None]:
        """The score of each row; None where a limit leaves no room to ask, the request fails or the reply holds none."""
        tasks = [self._task(row) for row in rows]
        keys = [step_key(KIND, model=self.generator.model.fingerprint, prompt=task.prompt) for task in tasks]
        known = self.ledger.get_many(keys)
        asked = [None if key in known else self._submitted(key, task) for key, task in zip(keys, tasks, strict=True)]
        return [
            int(known[key]) or None if key in known else self._received(key, request)
            for key, request in zip(keys, asked, strict=True)
        ]

    def _task(self, row: Row) -> Task:
        prompt = self.prompts.filled("score", question=row.question, answer=row.answer)
        return Task("score", prompt, _SCHEMA, _unread)

    def _submitted(self, key: str, task: Task) -> tuple[Handle, Usage] | None:
        most = Usage(self.generator.prompt_tokens(task), _SAMPLING.max_new_tokens or 0)
        if self.spending.refusal(most) is not None:
            return None
        self.spending.reserve(most)
        self.attempts.note(key, most)
        return self.generator.submit(task, _SAMPLING), most

    def _received(self, key: str, request: tuple[Handle, Usage] | None) -> int | None:
        if request is None:
            return None
        handle, most = request
        left = self.spending.seconds_left()
        try:
            completion = handle.result(None if left == float("inf") else max(left, 0.0))
        except (CalpacaError, TimeoutError):
            handle.cancel()
            self.spending.lose(most)
            return None
        self.spending.settle(most, completion.usage)
        found = _SCORE.search(completion.text)
        score = int(found[0]) if found is not None else _NONE
        self.ledger.put_many(KIND, {key: str(score).encode()})
        return score or None


def _unread(_: int, record: Record) -> Draft | Refused:
    return Refused("no_row", record)
