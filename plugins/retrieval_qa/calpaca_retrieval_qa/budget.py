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

_ROOM = 256
"""Tokens kept for an answer whose length is not given."""


@dataclass(frozen=True)
class Fitting:
    """Passages that the model is shown, and those that found no room."""

    kept: list[Source]
    left_out: list[Source]


def fit(chain: DocumentChain, question: str, passages: Sequence[Source], max_new_tokens: int | None) -> Fitting:
    """Drop passages, the worst first, until every prompt of the chain leaves room for its answer.

    The best passage stays: when even that is too long, the model's own error says by how much. A model that does not
    tell its context length gets everything.
    """
    limit = context_length(chain.llm)
    if limit is None:
        return Fitting(list(passages), [])
    room = limit - (max_new_tokens or _ROOM)
    if isinstance(chain, RefineChain):
        return _fit_each(chain, question, passages, room - (max_new_tokens or _ROOM))
    count = len(passages)
    while count > 1 and _tokens(chain, 1, question, passages[:count]) > room:
        count -= 1
    return Fitting(list(passages[:count]), list(passages[count:]))


def _fit_each(chain: DocumentChain, question: str, passages: Sequence[Source], room: int) -> Fitting:
    """Passages that fit one by one, beside the answer so far."""
    fitting = Fitting([], [])
    for passage in passages:
        fits = not fitting.kept or _tokens(chain, 2, question, [passage, passage]) <= room
        (fitting.kept if fits else fitting.left_out).append(passage)
    return fitting


def _tokens(chain: DocumentChain, step: int, question: str, passages: Sequence[Source]) -> int:
    """Tokens of the prompt of a step, without the answer before it."""
    inputs = chain_inputs(question, passages)
    return count_tokens(chain.llm, chain.prompt(step, inputs.pop("input_documents"), inputs, ""))


def chain_inputs(question: str, passages: Sequence[Source]) -> Inputs:
    """What the chains are given: passages as documents, numbered from 1."""
    documents = [
        Document(passage.text, metadata={"number": number, "source": passage.source})
        for number, passage in enumerate(passages, 1)
    ]
    return {"input_documents": documents, "question": question}


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
