"""Choosing the next token of each row of a batch from its logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from calpaca.core.engine import Sampling, TokenLogprob
from calpaca.core.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def new_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A random generator of a request's own, so that its draws do not depend on its neighbours in the batch."""
    import torch

    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred less likely: positive logits are divided, negative ones multiplied.

    logits [vocabulary]; seen [vocabulary], True for tokens of the prompt and the answer so far. Source: CTRL
    (arXiv:1909.05858), section 4.1, as transformers applies it.
    """
    import torch

    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from logits [vocabulary] (float32): temperature, then top-k, then top-p (nucleus), then a draw."""
    import torch

    scores = logits / sampling.temperature
    order: Tensor | None = None
    if sampling.top_k and sampling.top_k < scores.numel():
        scores, order = torch.topk(scores, sampling.top_k)
    elif sampling.top_p < 1.0:
        scores, order = torch.sort(scores, descending=True)
    probabilities = torch.softmax(scores, dim=-1)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)  # the first is always kept
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return int(choice if order is None else order[choice])


def token_logprob(logits: Tensor, token_id: int, alternatives: int, tokenizer: Tokenizer) -> TokenLogprob:
    """The model's own logarithmic probability of a token and of the likeliest alternatives; logits [vocabulary]."""
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, indices = torch.topk(logprobs, alternatives) if alternatives else (logprobs[:0], logprobs[:0])
    top = tuple(
        (int(index), tokenizer.decode([int(index)]), float(value))
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
        if math.isfinite(value)
    )
    return TokenLogprob(token_id, tokenizer.decode([token_id]), float(logprobs[token_id]), top)
