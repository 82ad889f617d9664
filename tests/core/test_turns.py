"""Who runs next where adapters share slots."""

from __future__ import annotations

from calpaca.core.engines.turns import Turns


def given(turns: Turns) -> dict[int, int]:
    """Everybody whose turn it is, with the slot."""
    pairs = {}
    while (pair := turns.next()) is not None:
        pairs[pair[0]] = pair[1]
    return pairs


def test_requests_without_adapters_fill_the_slots_in_their_order() -> None:
    turns = Turns(2)
    for key in (1, 2, 3):
        turns.add(key, None, [key])
    assert list(given(turns)) == [1, 2]
    turns.end(1)
    assert list(given(turns)) == [3]


def test_another_adapter_waits_for_those_before_it_and_holds_up_those_behind_it() -> None:
    turns = Turns(4)
    for key, adapter in ((1, "red"), (2, "red"), (3, "blue"), (4, "red")):
        turns.add(key, adapter, [key])
    assert list(given(turns)) == [1, 2]
    turns.end(1)
    assert given(turns) == {}
    turns.end(2)
    assert list(given(turns)) == [3]
    turns.end(3)
    assert list(given(turns)) == [4]


def test_a_request_that_waits_can_be_taken_out() -> None:
    turns = Turns(1)
    turns.add(1, None, [1])
    turns.add(2, "red", [2])
    turns.add(3, None, [3])
    given(turns)
    assert not turns.remove(1)
    assert turns.remove(2)
    turns.end(1)
    assert list(given(turns)) == [3]


def test_a_slot_is_used_again_for_what_it_keeps_under_the_same_adapter() -> None:
    turns = Turns(3)
    context = list(range(100))
    slots = {}
    for key, (adapter, prompt) in enumerate([(None, context), ("red", context), (None, [7] * 50)]):
        turns.add(key, adapter, prompt)
        slots |= given(turns)
        turns.end(key)
    assert len({*slots.values()}) == 3
    for key, adapter, prompt, slot in ((10, "red", [*context, 5], slots[1]), (11, None, [*context, 6], slots[0])):
        turns.add(key, adapter, prompt)
        assert given(turns) == {key: slot}
        turns.end(key)


def test_a_few_tokens_in_common_are_not_worth_a_slot() -> None:
    turns = Turns(2)
    turns.add(1, None, [1, *range(100, 200)])
    first = given(turns)[1]
    turns.end(1)
    turns.add(2, None, [1, *range(300, 400)])
    assert given(turns)[2] != first
