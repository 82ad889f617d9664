"""Passages that fit into a model's context, counted on the rendered prompt with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, BaseLanguageModel
from langchain_core.prompt_values import PromptValue

from calpaca.core.events import Source
from calpaca_retrieval_qa.chains import DocumentChain, Inputs, RefineChain
from calpaca_retrieval_qa.excerpt import excerpt
from calpaca_retrieval_qa.map_rerank import MapRerankChain

_ROOM = 256
"""Tokens kept for an answer whose length is not given."""


@dataclass(frozen=True)
class Fitting:
    """Passages that the model is shown, and those that found no room."""

    kept: list[Source]
    left_out: list[Source]


def fit(chain: DocumentChain, question: str, passages: Sequence[Source], max_new_tokens: int | None) -> Fitting:
    """Keep passages, the best first, as long as every prompt of the chain leaves room for its answer.

    When not one fits, the best is kept, so that the model's own error says by how much it is too long. A model that
    does not tell its context length gets everything.
    """
    limit = context_length(chain.llm)
    if limit is None:
        return Fitting(list(passages), [])
    answer = answer_room(max_new_tokens)
    fitting = Fitting([], [])
    for passage in passages:
        if isinstance(chain, RefineChain):  # one passage at a time, beside the answer so far
            fits = _tokens(chain, 2, question, [passage, passage]) + 2 * answer <= limit
        elif isinstance(chain, MapRerankChain):
            fits = _tokens(chain, 1, question, [passage]) + answer <= limit
        else:
            fits = _tokens(chain, 1, question, [*fitting.kept, passage]) + answer <= limit
        (fitting.kept if fits else fitting.left_out).append(passage)
    if not fitting.kept:
        return Fitting([passages[0]], list(passages[1:]))
    return fitting


def answer_room(max_new_tokens: int | None) -> int:
    """Tokens kept free for an answer."""
    return max_new_tokens or _ROOM


def prompt_tokens(chain: DocumentChain, question: str, passages: Sequence[Source]) -> int:
    """Tokens of all prompts of a chain, without the answers that `refine` repeats."""
    inputs = chain_inputs(question, passages)
    documents = inputs.pop("input_documents")
    prompts = (chain.prompt(step, documents, inputs, "") for step in range(1, chain.steps(documents) + 1))
    return sum(count_tokens(chain.llm, prompt) for prompt in prompts)


def _tokens(chain: DocumentChain, step: int, question: str, passages: Sequence[Source]) -> int:
    """Tokens of the prompt of a step, without the answer before it."""
    inputs = chain_inputs(question, passages)
    return count_tokens(chain.llm, chain.prompt(step, inputs.pop("input_documents"), inputs, ""))


def chain_inputs(question: str, passages: Sequence[Source], ranked: Sequence[Source] = ()) -> Inputs:
    """What the chains are given: passages as documents, numbered from 1, and excerpts of each and of all.

    The excerpt of all is taken from `ranked`, where the order of the passages is not that of their rank.
    """
    documents = [
        Document(
            passage.text,
            metadata={
                "text": passage.text,
                "number": number,
                "source": passage.source,
                "excerpt": excerpt(question, [passage.text]),
            },
        )
        for number, passage in enumerate(passages, 1)
    ]
    found = excerpt(question, [passage.text for passage in ranked or passages])
    return {"input_documents": documents, "question": question, "excerpt": found}


def count_tokens(llm: Any, prompt: PromptValue) -> int:
    """Tokens as the model counts them."""
    if isinstance(llm, BaseChatModel):
        return llm.get_num_tokens_from_messages(prompt.to_messages())
    return int(llm.get_num_tokens(prompt.to_string()))


def context_length(llm: Any) -> int | None:
    """Tokens that the model takes, or None where it does not say or does not count with its own tokenizer."""
    own_counter = any(
        getattr(type(llm), name, None) is not getattr(BaseLanguageModel, name)
        for name in ("get_token_ids", "get_num_tokens_from_messages")
    )
    profile = getattr(llm, "profile", None) or {}
    limit = profile.get("max_input_tokens")
    return int(limit) if limit and own_counter else None
