"""Errors say what happened and what to do, in this process and in another."""

import pickle

import pytest

from calpaca.core.errors import CalpacaError, ContextOverflowError, MissingExtraError, ModelError, unknown_name


@pytest.mark.parametrize(
    "error",
    [ModelError("It crashed.", "Try again."), ContextOverflowError(90, 20, 100), MissingExtraError("It", "pdf", "x")],
)
def test_an_error_comes_out_of_another_process_as_it_went_in(error: CalpacaError):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.__dict__) == (type(error), str(error), error.__dict__)


def test_an_overflow_says_by_how_much_and_what_would_fit():
    assert str(ContextOverflowError(90, 20, 100)).endswith(
        "Shorten the prompt by 10 tokens, or ask for at most 10 new tokens (--max-new-tokens 10)."
    )
    assert str(ContextOverflowError(120, 20, 100)).endswith("Shorten the prompt by 40 tokens.")


def test_an_unknown_name_comes_with_the_nearest_and_all_known():
    assert unknown_name("engine", "openvno", ["transformers", "openvino"]) == (
        "Unknown engine 'openvno'.",
        "Did you mean 'openvino'? Known: openvino, transformers.",
    )
