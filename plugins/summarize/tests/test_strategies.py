"""Which prompts are sent, in which rounds."""

from __future__ import annotations

import random

import pytest

from calpaca_summarize.strategies import Part, map_reduce, refine, rounds_of_map_reduce, stuff, together


class Words:
    """Prompts that are what they are made of."""

    def whole(self, texts):
        return ("whole", *texts)

    def part(self, text):
        return ("part", text)

    def first(self, text):
        return ("first", text)

    def refine(self, summary, text):
        return ("refine", summary, text)

    def collapse(self, summaries):
        return ("collapse", *summaries)

    def combine(self, summaries):
        return ("combine", *summaries)


def parts(*texts: str) -> list[Part]:
    return [Part(number, text) for number, text in enumerate(texts)]


def take(steps) -> tuple[str, list]:
    """Answers are numbered in the order of the prompts."""
    rounds, number = [], 0
    try:
        asks = next(steps)
        while True:
            rounds.append(asks)
            answers = [f"s{number + position}" for position in range(len(asks))]
            number += len(asks)
            asks = steps.send(answers)
    except StopIteration as end:
        return end.value, rounds


def prompts(rounds) -> list[list]:
    return [[ask.prompt for ask in asks] for asks in rounds]


def test_stuff_is_one_prompt() -> None:
    assert prompts(take(stuff(parts("a", "b"), Words()))[1]) == [[("whole", "a", "b")]]


def test_refine_shows_each_part_with_the_summary_so_far() -> None:
    summary, rounds = take(refine(parts("a", "b", "c"), Words()))
    assert prompts(rounds) == [[("first", "a")], [("refine", "s0", "b")], [("refine", "s1", "c")]]
    assert summary == "s2"
    assert [ask.last for asks in rounds for ask in asks] == [False, False, True]


def test_map_reduce_sums_up_branches_before_they_meet() -> None:
    a, b, c, d, e = parts(*"abcde")
    summary, rounds = take(map_reduce([[a, b, c], [d], [e]], Words(), 2))
    assert prompts(rounds) == [
        [("part", letter) for letter in "abcde"],
        [("collapse", "s0", "s1")],
        [("collapse", "s5", "s2")],
        [("collapse", "s6", "s3")],
        [("combine", "s7", "s4")],
    ]
    assert summary == "s8"


def test_what_fits_one_prompt_is_combined_at_once() -> None:
    a, b, c = parts(*"abc")
    assert len(take(map_reduce([[a, b], [c]], Words(), 3))[1]) == 2


def test_every_tree_ends_and_has_as_many_prompts_as_foretold() -> None:
    generator = random.Random(3)
    for _ in range(300):
        sizes = [generator.randrange(1, 30) for _ in range(generator.randrange(1, 12))]
        arity = generator.randrange(2, 9)
        branches = [parts(*"x" * size) for size in sizes]
        _, rounds = take(map_reduce(branches, Words(), arity))
        assert sum(map(len, rounds)) == rounds_of_map_reduce(sizes, arity)
        assert all(len(ask.prompt) - 1 <= arity for asks in rounds[1:] for ask in asks)
        assert [ask.last for asks in rounds for ask in asks].count(True) == 1


def test_strategies_side_by_side_share_their_rounds() -> None:
    several = [refine(parts("a", "b"), Words()), stuff(parts("c"), Words())]
    summaries, rounds = take(together(several))
    assert prompts(rounds) == [[("first", "a"), ("whole", "c")], [("refine", "s0", "b")]]
    assert summaries == ["s2", "s1"]


def test_nothing_side_by_side_is_nothing() -> None:
    with pytest.raises(StopIteration):
        next(together([]))
