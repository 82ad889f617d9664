"""Choosing the next token of each row of a batch from its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from calpaca.core.engine import Sampling, TokenLogprob
from calpaca.core.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LEAST_TEMPERATURE = 1e-5
"""Below it logits that are divided by the temperature leave the range of float32; the likeliest token has all there is."""

_AT_ONCE = 64
"""Rows of logits that are turned into log probabilities at a time, in float32."""


def new_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A random generator of a request's own, so that its draws do not depend on its neighbours in the batch."""
    import torch

    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class LogitsProcessor:
    """What a request changes in its logits before anything else: `logit_bias`, then the penalties.

    The order is that of vLLM and llama.cpp. `active` is False where nothing is changed.
    """

    def __init__(self, sampling: Sampling, prompt_tokens: int) -> None:
        self.active = (
            bool(sampling.logit_bias or sampling.frequency_penalty or sampling.presence_penalty)
            or sampling.repetition_penalty != 1.0
        )
        self._sampling = sampling
        self._prompt_tokens = prompt_tokens
        self._noted = 0
        self._state: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """logits [vocabulary] of the token after `ids`: the prompt and the answer so far."""
        if not self.active:
            return logits
        bias, seen, counts = self._update(logits, ids)
        logits = penalise_repetition(logits + bias, seen, self._sampling.repetition_penalty)
        return penalise_counts(logits, counts, self._sampling.frequency_penalty, self._sampling.presence_penalty)

    def _update(self, like: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Bias, whether a token occurred, and how often the answer has it, each [vocabulary]."""
        import torch

        if self._state is None:
            self._state = (torch.zeros_like(like), torch.zeros_like(like, dtype=torch.bool), torch.zeros_like(like))
            for token_id, value in self._sampling.logit_bias:
                self._state[0][token_id] = value
        _, seen, counts = self._state
        seen[torch.tensor(ids[self._noted :], dtype=torch.long, device=like.device)] = True
        for token_id in ids[max(self._noted, self._prompt_tokens) :]:
            counts[token_id] += 1
        self._noted = len(ids)
        return self._state


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred less likely: positive logits are divided, negative ones multiplied.

    logits [vocabulary]; seen [vocabulary], True for tokens of the prompt and the answer so far. Source: CTRL
    (arXiv:1909.05858), section 4.1, as transformers applies it.
    """
    import torch

    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalise_counts(logits: Tensor, counts: Tensor, frequency: float, presence: float) -> Tensor:
    """Subtract `frequency` for each time that the answer has a token, and `presence` once where it has it at all.

    logits and counts [vocabulary]. Source: OpenAI's API reference, "Frequency and presence penalties".
    """
    return logits - frequency * counts - presence * (counts > 0)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from logits [vocabulary] (float32): temperature, then top-k, then top-p (nucleus), then min-p, then a
    draw. min-p is arXiv:2407.01082, and looks at the probabilities after temperature, as transformers does."""
    import torch

    scores = logits / max(sampling.temperature, _LEAST_TEMPERATURE)
    order: Tensor | None = None
    if sampling.top_k and sampling.top_k < scores.numel():
        scores, order = torch.topk(scores, sampling.top_k)
    elif sampling.top_p < 1.0:
        scores, order = torch.sort(scores, descending=True)
    probabilities = torch.softmax(scores, dim=-1)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)  # the first is always kept
    if sampling.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0.0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return int(choice if order is None else order[choice])


def score(logits: Tensor, token_ids: Sequence[int], alternatives: int, tokenizer: Tokenizer) -> list[TokenLogprob]:
    """The model's own log probability of each token after its logits, and of the likeliest alternatives.

    logits [tokens, vocabulary]; a few rows of them at a time are made float32.
    """
    return [
        entry
        for begin in range(0, len(token_ids), _AT_ONCE)
        for entry in _score(
            logits[begin : begin + _AT_ONCE], token_ids[begin : begin + _AT_ONCE], alternatives, tokenizer
        )
    ]


def _score(logits: Tensor, token_ids: Sequence[int], alternatives: int, tokenizer: Tokenizer) -> list[TokenLogprob]:
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, indices = (found.tolist() for found in torch.topk(logprobs, alternatives, dim=-1))
    return [
        TokenLogprob(
            token_id, tokenizer.decode([token_id]), logprob,
            tuple((id, tokenizer.decode([id]), value) for id, value in zip(*likeliest, strict=True) if math.isfinite(value)),
        )
        for token_id, logprob, *likeliest in zip(token_ids, chosen, indices, values, strict=True)
    ]  # fmt: skip
