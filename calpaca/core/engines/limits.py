"""What a request may ask of a model that runs on this machine: ids of its vocabulary, and room in its context."""

from __future__ import annotations

from collections.abc import Sequence

from calpaca.core.engine import Sampling
from calpaca.core.errors import ContextOverflowError, UsageError

DEFAULT_NEW_TOKENS = 512
"""Length of an answer for which none is asked."""


def check_prompt(prompt: Sequence[int], vocabulary_size: int) -> None:
    """Raise UsageError for an empty prompt, and for ids that the model does not have."""
    if not prompt:
        raise UsageError("The prompt is empty.", "Give at least one token of text.")
    _check_ids((min(prompt), max(prompt)), vocabulary_size)


def check_bias(sampling: Sampling, vocabulary_size: int) -> None:
    """Raise UsageError for a `logit_bias` on an id that the model does not have."""
    _check_ids([token_id for token_id, _ in sampling.logit_bias], vocabulary_size)


def _check_ids(ids: Sequence[int], vocabulary_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocabulary_size:
            raise UsageError(
                f"Token id {token_id} is outside the vocabulary of {vocabulary_size}.",
                "Use ids of this model's own tokenizer.",
            )


def new_tokens(prompt_tokens: int, wanted: int | None, context_length: int) -> int:
    """How many tokens the answer may have. Raises ContextOverflowError when that does not fit."""
    room = context_length - prompt_tokens
    tokens = min(DEFAULT_NEW_TOKENS, max(room, 1)) if wanted is None else wanted
    if tokens > room:
        raise ContextOverflowError(prompt_tokens, tokens, context_length)
    return tokens
