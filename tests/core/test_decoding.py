"""Methods that no engine offers are refused by name, with what to use instead."""

import pytest

from calpaca.core.decoding import NOT_OFFERED, refuse_not_offered
from calpaca.core.errors import UnsupportedError


@pytest.mark.parametrize(
    ("name", "value", "title"),
    [("num_beams", 4, "beam search"), ("guidance_scale", 1.5, "guidance"), ("assistant_model", "tiny", "draft model")],
)
def test_a_method_is_refused_by_name_with_a_way_out(name: str, value: object, title: str) -> None:
    with pytest.raises(UnsupportedError, match=title) as caught:
        refuse_not_offered({"temperature": 1.0, name: value})
    assert name in caught.value.message
    assert caught.value.hint


def test_a_method_that_is_switched_off_is_not_refused() -> None:
    refuse_not_offered({"num_beams": 1, "guidance_scale": 1.0, "draft_model": None, "use_beam_search": False})
    refuse_not_offered({"temperature": 0.5})


def test_every_method_says_what_to_use_instead() -> None:
    assert all(method.title and method.instead.endswith(".") for method in NOT_OFFERED.values())
