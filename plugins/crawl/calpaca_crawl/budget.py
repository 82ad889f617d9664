"""What a run may use, what it has used, and what the rest will take."""

from __future__ import annotations

import time
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

    def cost(self, prompt_tokens: int, new_tokens: int) -> float:
        return (prompt_tokens * self.price_in + new_tokens * self.price_out) / 1e6


@dataclass
class Spending:
    """Tokens of the run so far, those of requests under way at their most."""

    budget: Budget
    usage: Usage = field(default_factory=Usage)
    reserved: list[tuple[int, int]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def refusal(self, prompt_tokens: int, new_tokens: int) -> str | None:
        """The limit that a request might break, at its most; None where there is room for it."""
        prompts = self.usage.prompt_tokens + prompt_tokens + sum(prompt for prompt, _ in self.reserved)
        new = self.usage.completion_tokens + new_tokens + sum(each for _, each in self.reserved)
        budget = self.budget
        if budget.max_tokens is not None and prompts + new > budget.max_tokens:
            return "max_tokens"
        if budget.max_cost is not None and budget.cost(prompts, new) > budget.max_cost:
            return "max_cost"
        return "max_time" if self.seconds_left() <= 0.0 else None

    def reserve(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        self.reserved.append((prompt_tokens, new_tokens))
        return self.reserved[-1]

    def settle(self, reserved: tuple[int, int] | None, usage: Usage) -> None:
        """Count what a request really took."""
        if reserved is not None:
            self.reserved.remove(reserved)
        self.usage += usage

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def seconds_left(self) -> float:
        return float("inf") if self.budget.max_time is None else self.budget.max_time - self.seconds

    @property
    def cost(self) -> float:
        return self.budget.cost(self.usage.prompt_tokens, self.usage.completion_tokens)

    def forecast(self, rows: int) -> str:
        """What the rows that are still wanted will take, in words, at the rate so far."""
        tokens = self.usage.total_tokens
        said = f"{rows} rows so far took {tokens:,} tokens and {self.seconds:.0f} s"
        wanted = self.budget.max_rows
        if wanted is None or not rows or rows >= wanted:
            return said + "."
        factor = wanted / rows
        cost = f" and cost {self.cost * factor:.4g}" if self.cost else ""
        return (
            f"{said}; {wanted} rows will take about {tokens * factor:,.0f} tokens, {self.seconds * factor:.0f} s{cost}."
        )
