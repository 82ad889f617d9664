"""What a run may use and has used: limits, requests without a reply, forecasts."""

from __future__ import annotations

import pytest

from calpaca.core.engine import Usage
from calpaca_crawl.budget import Budget, Spending


def spending(**limits: float) -> Spending:
    """A run that has used 2,000 tokens, at a cost of 2."""
    return Spending(Budget(price_in=1_000, price_out=1_000, **limits), usage=Usage(1_000, 1_000))


def test_a_request_that_might_break_a_limit_has_no_room() -> None:
    run = spending(max_tokens=2_500)
    assert run.refusal(Usage(100, 400)) is None
    run.reserve(Usage(100, 100))
    assert run.refusal(Usage(100, 400)) == "max_tokens"


def test_a_request_without_a_reply_counts_as_what_it_may_have_taken() -> None:
    run = spending(max_cost=2.5)
    run.reserve(Usage(100, 400))
    run.lose(Usage(100, 400))
    assert run.cost == pytest.approx(2.5)
    assert run.refusal(Usage(1, 1)) == "max_cost"
    assert run.usage == Usage(1_000, 1_000)


@pytest.mark.parametrize(
    ("limits", "rows", "said"),
    [
        ({"max_rows": 100}, 10, "100 rows will take about 20,000 tokens, 0 s and a cost of 20."),
        ({"max_rows": 100, "max_tokens": 5_000}, 10, "max_tokens will end the run at about 25 rows."),
        ({"max_rows": 100, "max_cost": 6, "max_tokens": 10_000}, 10, "max_cost will end the run at about 30 rows."),
        ({"max_rows": 100}, 0, "at this rate there will be none."),
        ({"max_rows": 10}, 10, "10 rows so far took 2,000 tokens, 0 s and a cost of 2."),
    ],
)
def test_the_forecast_names_what_is_wanted_and_the_limit_that_comes_first(limits, rows, said) -> None:
    assert said in spending(**limits).forecast(rows)
