"""The `stuff` and `refine` chains as small LangChain Runnables.

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
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import patch_config
from langchain_core.runnables.utils import AddableDict

Inputs = dict[str, Any]

_WHOLE_TEXT = PromptTemplate.from_template("{page_content}")


@dataclass(frozen=True)
class Piece:
    """A piece of the answer of a step; steps count from 1. `message` is what a chat model gave, with its usage."""

    step: int
    text: str
    message: AIMessageChunk | None = None


class DocumentChain(Runnable[Inputs, Inputs]):
    """A chain that asks a model one or more times about documents."""

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
    def output(self, answers: list[str]) -> Inputs:
        """The chain's output for the answers of all steps."""

    def pieces(self, inputs: Inputs, config: RunnableConfig | None = None) -> Iterator[Piece]:
        """The answers of all steps as they come."""
        documents, variables = _documents(inputs)
        answer = ""
        for step in range(1, self.steps(documents) + 1):
            prompt, answer = self.prompt(step, documents, variables, answer), ""
            for chunk in self.llm.stream(prompt, config):
                piece = _piece(step, chunk)
                answer += piece.text
                yield piece

    async def apieces(self, inputs: Inputs, config: RunnableConfig | None = None) -> AsyncIterator[Piece]:
        """`pieces` for an event loop."""
        documents, variables = _documents(inputs)
        answer = ""
        for step in range(1, self.steps(documents) + 1):
            prompt, answer = self.prompt(step, documents, variables, answer), ""
            async for chunk in self.llm.astream(prompt, config):
                piece = _piece(step, chunk)
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

    def _run(self, input: Inputs, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> Inputs:
        answers = _Answers(self.steps(_documents(input)[0]))
        for piece in self.pieces(input, patch_config(config, callbacks=run_manager.get_child())):
            answers.add(piece)
        return self.output(answers.texts)

    async def _arun(
        self, input: Inputs, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> Inputs:
        answers = _Answers(self.steps(_documents(input)[0]))
        async for piece in self.apieces(input, patch_config(config, callbacks=run_manager.get_child())):
            answers.add(piece)
        return self.output(answers.texts)

    def _stream(
        self, inputs: Iterator[Inputs], run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> Iterator[Inputs]:
        for input in inputs:
            answers = _Answers(self.steps(_documents(input)[0]))
            for piece in self.pieces(input, patch_config(config, callbacks=run_manager.get_child())):
                answers.add(piece)
                if piece.step == answers.steps:
                    yield AddableDict(output_text=piece.text)
            yield AddableDict({**self.output(answers.texts), "output_text": ""})

    async def _astream(
        self, inputs: AsyncIterator[Inputs], run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> AsyncIterator[Inputs]:
        async for input in inputs:
            answers = _Answers(self.steps(_documents(input)[0]))
            async for piece in self.apieces(input, patch_config(config, callbacks=run_manager.get_child())):
                answers.add(piece)
                if piece.step == answers.steps:
                    yield AddableDict(output_text=piece.text)
            yield AddableDict({**self.output(answers.texts), "output_text": ""})


class StuffChain(DocumentChain):
    """All documents in one prompt."""

    def __init__(
        self,
        llm: LanguageModelLike,
        prompt: BasePromptTemplate[Any],
        *,
        document_variable_name: str = "context",
        document_prompt: BasePromptTemplate[str] = _WHOLE_TEXT,
        document_separator: str = "\n\n",
    ) -> None:
        super().__init__(llm, document_variable_name=document_variable_name, document_prompt=document_prompt)
        self.template = prompt
        self.document_separator = document_separator

    def steps(self, documents: Sequence[Document]) -> int:  # noqa: ARG002
        return 1

    def prompt(
        self,
        step: int,  # noqa: ARG002  # there is only one  # noqa: ARG002
        documents: Sequence[Document],
        variables: Mapping[str, Any],
        answer: str,  # noqa: ARG002
    ) -> PromptValue:
        texts = (format_document(document, self.document_prompt) for document in documents)
        context = self.document_separator.join(texts)
        return self.template.invoke({**variables, self.document_variable_name: context})

    def output(self, answers: list[str]) -> Inputs:
        return {"output_text": answers[-1]}


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
        document_prompt: BasePromptTemplate[str] = _WHOLE_TEXT,
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
        text = format_document(documents[step - 1], self.document_prompt)
        values = {**variables, self.document_variable_name: text}
        if step == 1:
            return self.question_prompt.invoke(values)
        return self.refine_prompt.invoke({**values, self.initial_response_name: answer})

    def output(self, answers: list[str]) -> Inputs:
        steps = {"intermediate_steps": answers} if self.return_intermediate_steps else {}
        return {"output_text": answers[-1], **steps}


class _Answers:
    """The texts of the steps, put together from pieces."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.texts = [""] * steps

    def add(self, piece: Piece) -> None:
        self.texts[piece.step - 1] += piece.text


def _documents(inputs: Inputs) -> tuple[list[Document], Inputs]:
    """The documents of an input, and its other variables."""
    documents = list(inputs["input_documents"])
    if not documents:
        raise ValueError("input_documents is empty: there is nothing to ask about")
    return documents, {name: value for name, value in inputs.items() if name != "input_documents"}


def _piece(step: int, chunk: BaseMessage | str) -> Piece:
    """A chunk of a chat model or an LLM."""
    if isinstance(chunk, str):
        return Piece(step, chunk)
    return Piece(step, str(chunk.text), chunk if isinstance(chunk, AIMessageChunk) else None)
