"""The `stuff` and `refine` chains as small LangChain Runnables, and what `map_rerank` shares with them.

They take the arguments of the classic chains and send the same prompts. Input: `input_documents` (a list of Documents)
and the prompt's other variables, such as `question`; output: `output_text`, and `intermediate_steps` of `refine` when
they are asked for. They run on any chat model or LLM of langchain-core, stream, and show up in `astream_events`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelLike
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import patch_config
from langchain_core.runnables.utils import AddableDict

Inputs = dict[str, Any]

WHOLE_TEXT = PromptTemplate.from_template("{page_content}")


@dataclass(frozen=True)
class Piece:
    """A piece of the answer of a step; steps count from 1. `message` is what a chat model gave, with its usage."""

    step: int
    text: str
    message: AIMessage | None = None


class DocumentChain(Runnable[Inputs, Inputs]):
    """A chain that asks a model one or more times about documents."""

    streams_last_step = True
    """Whether the last step's text is the answer."""

    def __init__(
        self, llm: LanguageModelLike, *, document_variable_name: str, document_prompt: BasePromptTemplate[str]
    ) -> None:
        self.llm = llm
        self.document_variable_name = document_variable_name
        self.document_prompt = document_prompt

    @abstractmethod
    def steps(self, documents: Sequence[Document]) -> int:
        """How often the model is asked."""

    @abstractmethod
    def prompt(
        self, step: int, documents: Sequence[Document], variables: Mapping[str, Any], answer: str
    ) -> PromptValue:
        """What is sent in a step; `answer` is that of the step before."""

    @abstractmethod
    def output(self, pieces: Sequence[Piece], documents: Sequence[Document]) -> Inputs:
        """The chain's output for the answers of all steps, a whole piece for each."""

    def formatted(self, document: Document) -> str:
        """A document as the model is shown it."""
        return format_document(document, self.document_prompt)

    def pieces(self, inputs: Inputs, config: RunnableConfig | None = None) -> Iterator[Piece]:
        """The answers of all steps as they come."""
        documents, variables = split_inputs(inputs)
        answer = ""
        for step in range(1, self.steps(documents) + 1):
            prompt, answer = self.prompt(step, documents, variables, answer), ""
            for chunk in self.llm.stream(prompt, config):
                piece = piece_of(step, chunk)
                answer += piece.text
                yield piece

    async def apieces(self, inputs: Inputs, config: RunnableConfig | None = None) -> AsyncIterator[Piece]:
        """`pieces` for an event loop."""
        documents, variables = split_inputs(inputs)
        answer = ""
        for step in range(1, self.steps(documents) + 1):
            prompt, answer = self.prompt(step, documents, variables, answer), ""
            async for chunk in self.llm.astream(prompt, config):
                piece = piece_of(step, chunk)
                answer += piece.text
                yield piece

    # Runnable ------------------------------------------------------------------------------------------------------
    def invoke(self, input: Inputs, config: RunnableConfig | None = None, **_: Any) -> Inputs:
        return self._call_with_config(self._run, input, config)

    async def ainvoke(self, input: Inputs, config: RunnableConfig | None = None, **_: Any) -> Inputs:
        return await self._acall_with_config(self._arun, input, config)

    def stream(self, input: Inputs, config: RunnableConfig | None = None, **_: Any) -> Iterator[Inputs]:
        """Parts of the output that add up to it: the last step's text as it comes, then the rest."""
        yield from self._transform_stream_with_config(iter([input]), self._stream, config)

    async def astream(self, input: Inputs, config: RunnableConfig | None = None, **_: Any) -> AsyncIterator[Inputs]:
        async def inputs() -> AsyncIterator[Inputs]:
            yield input

        async for part in self._atransform_stream_with_config(inputs(), self._astream, config):
            yield part

    def _rest(self, output: Inputs) -> Inputs:
        """What of the output was not streamed."""
        return {**output, "output_text": ""} if self.streams_last_step else output

    def _run(self, input: Inputs, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> Inputs:
        documents = split_inputs(input)[0]
        answers = _Answers(self.steps(documents))
        for piece in self.pieces(input, patch_config(config, callbacks=run_manager.get_child())):
            answers.add(piece)
        return self.output(answers.pieces, documents)

    async def _arun(
        self, input: Inputs, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> Inputs:
        documents = split_inputs(input)[0]
        answers = _Answers(self.steps(documents))
        async for piece in self.apieces(input, patch_config(config, callbacks=run_manager.get_child())):
            answers.add(piece)
        return self.output(answers.pieces, documents)

    def _stream(
        self, inputs: Iterator[Inputs], run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> Iterator[Inputs]:
        for input in inputs:
            documents = split_inputs(input)[0]
            answers = _Answers(self.steps(documents))
            for piece in self.pieces(input, patch_config(config, callbacks=run_manager.get_child())):
                answers.add(piece)
                if self.streams_last_step and piece.step == answers.steps:
                    yield AddableDict(output_text=piece.text)
            yield AddableDict(self._rest(self.output(answers.pieces, documents)))

    async def _astream(
        self, inputs: AsyncIterator[Inputs], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> AsyncIterator[Inputs]:
        async for input in inputs:
            documents = split_inputs(input)[0]
            answers = _Answers(self.steps(documents))
            async for piece in self.apieces(input, patch_config(config, callbacks=run_manager.get_child())):
                answers.add(piece)
                if self.streams_last_step and piece.step == answers.steps:
                    yield AddableDict(output_text=piece.text)
            yield AddableDict(self._rest(self.output(answers.pieces, documents)))


class StuffChain(DocumentChain):
    """All documents in one prompt."""

    def __init__(
        self,
        llm: LanguageModelLike,
        prompt: BasePromptTemplate[Any],
        *,
        document_variable_name: str = "context",
        document_prompt: BasePromptTemplate[str] = WHOLE_TEXT,
        document_separator: str = "\n\n",
    ) -> None:
        super().__init__(llm, document_variable_name=document_variable_name, document_prompt=document_prompt)
        self.template = prompt
        self.document_separator = document_separator

    def steps(self, documents: Sequence[Document]) -> int:  # noqa: ARG002
        return 1

    def prompt(
        self,
        step: int,  # noqa: ARG002  # there is only one
        documents: Sequence[Document],
        variables: Mapping[str, Any],
        answer: str,  # noqa: ARG002
    ) -> PromptValue:
        texts = (self.formatted(document) for document in documents)
        context = self.document_separator.join(texts)
        return self.template.invoke({**variables, self.document_variable_name: context})

    def output(self, pieces: Sequence[Piece], documents: Sequence[Document]) -> Inputs:  # noqa: ARG002
        return {"output_text": pieces[-1].text}


class RefineChain(DocumentChain):
    """An answer from the first document, improved with each further one."""

    def __init__(
        self,
        llm: LanguageModelLike,
        question_prompt: BasePromptTemplate[Any],
        refine_prompt: BasePromptTemplate[Any],
        *,
        document_variable_name: str = "context_str",
        initial_response_name: str = "existing_answer",
        document_prompt: BasePromptTemplate[str] = WHOLE_TEXT,
        return_intermediate_steps: bool = False,
    ) -> None:
        super().__init__(llm, document_variable_name=document_variable_name, document_prompt=document_prompt)
        self.question_prompt = question_prompt
        self.refine_prompt = refine_prompt
        self.initial_response_name = initial_response_name
        self.return_intermediate_steps = return_intermediate_steps

    def steps(self, documents: Sequence[Document]) -> int:
        return len(documents)

    def prompt(
        self, step: int, documents: Sequence[Document], variables: Mapping[str, Any], answer: str
    ) -> PromptValue:
        text = self.formatted(documents[step - 1])
        values = {**variables, self.document_variable_name: text}
        if step == 1:
            return self.question_prompt.invoke(values)
        return self.refine_prompt.invoke({**values, self.initial_response_name: answer})

    def output(self, pieces: Sequence[Piece], documents: Sequence[Document]) -> Inputs:  # noqa: ARG002
        answers = [piece.text for piece in pieces]
        steps = {"intermediate_steps": answers} if self.return_intermediate_steps else {}
        return {"output_text": answers[-1], **steps}


class _Answers:
    """The answers of the steps, put together from pieces; each keeps the last message it came with."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.pieces = [Piece(step, "") for step in range(1, steps + 1)]

    def add(self, piece: Piece) -> None:
        before = self.pieces[piece.step - 1]
        self.pieces[piece.step - 1] = Piece(piece.step, before.text + piece.text, piece.message or before.message)


def split_inputs(inputs: Inputs) -> tuple[list[Document], Inputs]:
    """The documents of an input, and its other variables."""
    documents = list(inputs["input_documents"])
    if not documents:
        raise ValueError("input_documents is empty: there is nothing to ask about")
    return documents, {name: value for name, value in inputs.items() if name != "input_documents"}


def piece_of(step: int, chunk: BaseMessage | str) -> Piece:
    """A chunk of a chat model or an LLM."""
    if isinstance(chunk, str):
        return Piece(step, chunk)
    return Piece(step, str(chunk.text), chunk if isinstance(chunk, AIMessage) else None)
