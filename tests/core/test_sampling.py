"""How a token is chosen: the filters and penalties against transformers' own, and against their published formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest

from calpaca.core.engine import Request, Sampling
from calpaca.core.errors import UsageError
from calpaca.core.sampling import LogitsProcessor, new_generator, sample

torch = pytest.importorskip("torch")

VOCABULARY = 40


def logits() -> Any:
    return 3.0 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5))


def drawn(sampling: Sampling, draws: int = 4000) -> Any:
    """How often each token is drawn, [vocabulary]."""
    generator = new_generator(11, torch.device("cpu"))
    found = torch.tensor([sample(logits(), sampling, generator) for _ in range(draws)])
    return torch.bincount(found, minlength=VOCABULARY) / draws


@pytest.mark.parametrize(
    "filters",
    [{"min_p": 0.1}, {"min_p": 0.05, "top_k": 6}, {"min_p": 0.02, "top_p": 0.9}, {"top_p": 0.8}, {"top_k": 3}],
)
def test_the_distribution_is_that_of_transformers(filters: dict[str, Any]) -> None:
    from transformers.generation import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    makers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    warpers = [TemperatureLogitsWarper(1.3), *(makers[name](filters[name]) for name in makers if name in filters)]
    expected = torch.softmax(LogitsProcessorList(warpers)(torch.zeros(1, 1), logits()[None])[0], dim=-1)
    found = drawn(Sampling(temperature=1.3, **filters))
    assert set(found.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    assert float((found - expected).abs().max()) < 0.03


def test_min_p_1_is_greedy() -> None:
    assert float(drawn(Sampling(temperature=2.0, min_p=1.0), 50)[int(logits().argmax())]) == 1.0


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-6])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    assert float(drawn(Sampling(temperature=temperature, top_p=0.9), 50)[logits().argmax()]) == 1.0
    assert float(drawn(Sampling(temperature=temperature), 50)[logits().argmax()]) == 1.0


def test_penalties_follow_the_published_formula_and_count_the_answer_only() -> None:
    processor = LogitsProcessor(Sampling(frequency_penalty=0.5, presence_penalty=1.25), prompt_tokens=3)
    assert torch.equal(processor(logits(), [7, 7, 8]), logits())
    changed = processor(logits(), [7, 7, 8, 9, 9, 8, 9])
    counts = {9: 3, 8: 1}
    for token_id, value in enumerate(logits().tolist()):
        count = counts.get(token_id, 0)
        assert float(changed[token_id]) == pytest.approx(value - 0.5 * count - 1.25 * (count > 0))


def test_the_repetition_penalty_counts_the_prompt_too() -> None:
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    ids = [3, 5, 5, 9]
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([ids]), logits()[None].clone())[0]
    processor = LogitsProcessor(Sampling(repetition_penalty=1.4), prompt_tokens=2)
    processor(logits(), ids[:3])
    assert torch.allclose(processor(logits(), ids), expected)


def test_a_bias_is_added_to_its_token_alone() -> None:
    changed = LogitsProcessor(Sampling(logit_bias=((4, 100.0), (6, -2.5))), 1)(logits(), [1])
    difference = (changed - logits()).tolist()
    assert difference[4] == pytest.approx(100.0)
    assert difference[6] == pytest.approx(-2.5)
    assert [value for index, value in enumerate(difference) if index not in {4, 6}] == [0.0] * (VOCABULARY - 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("frequency_penalty", -2.1),
        ("presence_penalty", math.inf),
        ("logit_bias", ((3, 101.0),)),
        ("logit_bias", ((3, 1.0), (3, 2.0))),
        ("logit_bias", ((-1, 1.0),)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})


def test_an_answer_of_no_tokens_needs_a_prompt_that_is_scored() -> None:
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        Request("a", Sampling(max_new_tokens=0))
    with pytest.raises(UsageError, match="prompt_logprobs"):
        Request("a", prompt_logprobs=21)
    assert Request("a", Sampling(max_new_tokens=0), prompt_logprobs=0).prompt_logprobs == 0
