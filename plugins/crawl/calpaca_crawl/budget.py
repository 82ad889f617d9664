"""What a run may use, what it has used, and what the rest will take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from calpaca.core.engine import Usage


@dataclass(frozen=True)
class Budget:
    """Hard limits; None is no limit. `max_time` in seconds; prices for a million tokens, in any currency."""

    max_rows: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    max_time: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def cost(self, usage: Usage) -> float:
        return (usage.prompt_tokens * self.price_in + usage.completion_tokens * self.price_out) / 1e6


@dataclass
class Spending:
    """Tokens of the run so far.

    `usage` is what replies took. `lost` is what requests without a reply may have taken, at their most: nobody says what
    a server did before it failed or was no longer waited for. Those of `reserved` are under way.
    """

    budget: Budget
    usage: Usage = field(default_factory=Usage)
    lost: Usage = field(default_factory=Usage)
    reserved: list[Usage] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def refusal(self, most: Usage) -> str | None:
        """The limit that a request of at most so many tokens might break; None where there is room for it."""
        used = sum(self.reserved, self.spent + most)
        budget = self.budget
        if budget.max_tokens is not None and used.total_tokens > budget.max_tokens:
            return "max_tokens"
        if budget.max_cost is not None and budget.cost(used) > budget.max_cost:
            return "max_cost"
        return "max_time" if self.seconds_left() <= 0.0 else None

    def reserve(self, most: Usage) -> None:
        self.reserved.append(most)

    def settle(self, reserved: Usage, usage: Usage) -> None:
        """Count what a request really took."""
        self.reserved.remove(reserved)
        self.usage += usage

    def lose(self, reserved: Usage) -> None:
        """Count a request that brought no reply."""
        self.reserved.remove(reserved)
        self.lost += reserved

    @property
    def spent(self) -> Usage:
        return self.usage + self.lost

    @property
    def cost(self) -> float:
        return self.budget.cost(self.spent)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def seconds_left(self) -> float:
        return float("inf") if self.budget.max_time is None else self.budget.max_time - self.seconds

    def forecast(self, rows: int) -> str:
        """What the rows that are wanted will take at the rate so far, in words, and which limit will end them before."""
        said = f"{rows} rows so far took {self._in_words(1.0)}"
        wanted = self.budget.max_rows
        if not rows:
            return f"{said}; at this rate there will be none."
        if wanted is None or rows >= wanted:
            return f"{said}."
        said += f"; {wanted} rows will take about {self._in_words(wanted / rows)}"
        share, limit = min(self._shares(), default=(float("inf"), ""))
        within = rows * share
        return f"{said}; {limit} will end the run at about {within:.0f} rows." if within < wanted else f"{said}."

    def _in_words(self, factor: float) -> str:
        tokens, seconds = f"{self.spent.total_tokens * factor:,.0f} tokens", f"{self.seconds * factor:.0f} s"
        return f"{tokens}, {seconds} and a cost of {self.cost * factor:.4g}" if self.cost else f"{tokens} and {seconds}"

    def _shares(self) -> Iterator[tuple[float, str]]:
        """How many times what is used so far each limit allows."""
        budget = self.budget
        for limit, used, name in (
            (budget.max_tokens, self.spent.total_tokens, "max_tokens"),
            (budget.max_cost, self.cost, "max_cost"),
            (budget.max_time, self.seconds, "max_time"),
        ):
            if limit is not None and used:
                yield limit / used, name
