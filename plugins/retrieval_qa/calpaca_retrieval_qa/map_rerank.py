"""The `map_rerank` chain: each document asked about alone, all at once; the answer with the best score wins."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelLike
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import RunnableConfig

from calpaca_retrieval_qa.chains import WHOLE_TEXT, DocumentChain, Inputs, Piece, piece_of, split_inputs

Rate = Callable[[Piece, Document], Mapping[str, Any]]
"""What a reply is worth: a mapping with the chain's `answer_key` and `rank_key`."""


class MapRerankChain(DocumentChain):
    """One prompt for each document. The prompts are sent as one batch, so that they share the engine's forward passes.

    As with the classic chain, the prompt's `output_parser` finds answer and score in a reply; `rate` does so in its
    stead. The first of equal scores wins. `metadata_keys` are given out of the winner's document.
    """

    streams_last_step = False

    def __init__(
        self,
        llm: LanguageModelLike,
        prompt: BasePromptTemplate[Any],
        *,
        document_variable_name: str = "context",
        rank_key: str = "score",
        answer_key: str = "answer",
        document_prompt: BasePromptTemplate[str] = WHOLE_TEXT,
        metadata_keys: Sequence[str] = (),
        return_intermediate_steps: bool = False,
        rate: Rate | None = None,
    ) -> None:
        super().__init__(llm, document_variable_name=document_variable_name, document_prompt=document_prompt)
        self.template = prompt
        self.rank_key = rank_key
        self.answer_key = answer_key
        self.metadata_keys = metadata_keys
        self.return_intermediate_steps = return_intermediate_steps
        self.rate = rate or _by_parser(prompt)

    def steps(self, documents: Sequence[Document]) -> int:
        return len(documents)

    def prompt(
        self,
        step: int,
        documents: Sequence[Document],
        variables: Mapping[str, Any],
        answer: str,  # noqa: ARG002  # each document is asked about alone
    ) -> PromptValue:
        text = self.formatted(documents[step - 1])
        return self.template.invoke({**variables, self.document_variable_name: text})

    def pieces(self, inputs: Inputs, config: RunnableConfig | None = None) -> Iterator[Piece]:
        """The whole answers of all steps, in the order of the documents."""
        for step, reply in enumerate(self.llm.batch(self._prompts(inputs), config), 1):
            yield piece_of(step, reply)

    async def apieces(self, inputs: Inputs, config: RunnableConfig | None = None) -> AsyncIterator[Piece]:
        for step, reply in enumerate(await self.llm.abatch(self._prompts(inputs), config), 1):
            yield piece_of(step, reply)

    def _prompts(self, inputs: Inputs) -> list[Any]:
        documents, variables = split_inputs(inputs)
        return [self.prompt(step, documents, variables, "") for step in range(1, len(documents) + 1)]

    def output(self, pieces: Sequence[Piece], documents: Sequence[Document]) -> Inputs:
        ratings = [self.rate(piece, document) for piece, document in zip(pieces, documents, strict=True)]
        best = self.best(ratings)
        steps = {"intermediate_steps": ratings} if self.return_intermediate_steps else {}
        found = {key: documents[best].metadata[key] for key in self.metadata_keys}
        return {"output_text": ratings[best][self.answer_key], **found, **steps}

    def best(self, ratings: Sequence[Mapping[str, Any]]) -> int:
        """The position of the best score."""
        return max(range(len(ratings)), key=lambda position: float(ratings[position][self.rank_key]))


def _by_parser(prompt: BasePromptTemplate[Any]) -> Rate:
    parser: BaseOutputParser[Any] | None = prompt.output_parser
    if parser is None:
        raise ValueError("map_rerank needs a prompt with an output_parser that finds answer and score, or `rate`")

    def rate(piece: Piece, document: Document) -> Mapping[str, Any]:  # noqa: ARG001
        found: Mapping[str, Any] = parser.parse(piece.text)
        return found

    return rate
