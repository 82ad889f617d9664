"""Questions answered from passages: look up, check that there is something to go by, ask the model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForChainRun
from langchain_core.language_models import BaseLanguageModel
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import patch_config, run_in_executor
from langchain_core.vectorstores import VectorStore

from calpaca.core.engine import Usage
from calpaca.core.errors import UsageError
from calpaca.core.events import Event, Notice, Result, Source, Step, Token, UsageReport
from calpaca.documents.retrieval import Search, retrieve
from calpaca_retrieval_qa.budget import chain_inputs, fit
from calpaca_retrieval_qa.chains import DocumentChain, Piece, RefineChain, StuffChain
from calpaca_retrieval_qa.evidence import EvidenceRule, Verdict
from calpaca_retrieval_qa.history import History, fit_history
from calpaca_retrieval_qa.prompts import Prompts, language_of, load_prompts

Strategy = Literal["stuff", "refine"]
Turns = Sequence[Mapping[str, str]]


@dataclass
class _Answer:
    """What is known so far of an answer under way."""

    strategy: Strategy
    model: str
    history: History
    started: float = field(default_factory=time.monotonic)
    texts: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    timings: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """Note the seconds since the question came."""
        self.timings.setdefault(name, round(time.monotonic() - self.started, 3))

    def value(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        self.mark("total")
        steps = {"intermediate_steps": self.texts} if self.strategy == "refine" else {}
        return {
            "answer": self.texts[-1] if self.texts else "",
            "strategy": self.strategy,
            "sources": [_as_json(source) for source in self.sources],
            **steps,
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "completion_tokens": self.usage.completion_tokens,
                "total_tokens": self.usage.total_tokens,
            },
            "timings": self.timings,
            "model": self.model,
            "notices": self.notices,
        }


class RetrievalQA(Runnable[str, Any]):
    """Answers questions from what a retriever or vector store finds.

    Any chat model or LLM and any retriever or store of langchain-core will do:

        RetrievalQA(llm=ChatCalpaca(), retriever=store).invoke("Who keeps the key?")["answer"]

    `stream` gives calpaca's events, the last one a Result; `invoke` gives that result's value. `prepare` is run before
    each question, to bring an index up to date. Prompts are those of the question's language, or of `prompt_file`.
    `max_new_tokens` is the room kept for the answer when passages are fitted into the context. `history`, an argument of
    each of them, are the earlier turns of the conversation (`role` and `content`, oldest first): the question is looked up
    together with the one before it, and the model is shown the turns.
    """

    def __init__(
        self,
        llm: BaseLanguageModel[Any],
        retriever: VectorStore | BaseRetriever,
        *,
        strategy: Strategy = "stuff",
        search: Search = Search(),
        prompt_file: Path | None = None,
        evidence: EvidenceRule = EvidenceRule(),
        prepare: Callable[[], Iterator[Event]] = lambda: iter(()),
        max_new_tokens: int | None = None,
        model_name: str = "",
        languages: str = "",
    ) -> None:
        self.llm = llm
        self.retriever = retriever
        self.strategy = strategy
        self.search = search
        self.prompt_file = prompt_file
        self.evidence = evidence
        self.prepare = prepare
        self.max_new_tokens = max_new_tokens
        self.model_name = model_name or _model_name(llm)
        self.languages = languages
        load_prompts("en", prompt_file)  # a wrong file is said now, not at the first question

    # Runnable ------------------------------------------------------------------------------------------------------
    def invoke(self, input: str, config: RunnableConfig | None = None, **arguments: Any) -> dict[str, Any]:
        value: dict[str, Any] = self._call_with_config(self._last, input, config, **_history(arguments))
        return value

    def stream(self, input: str, config: RunnableConfig | None = None, **arguments: Any) -> Iterator[Any]:
        """Events; the last one is a Result."""
        history = _history(arguments)
        yield from self._transform_stream_with_config(iter([input]), self._transform, config, **history)

    async def astream(self, input: str, config: RunnableConfig | None = None, **arguments: Any) -> AsyncIterator[Any]:
        """`stream`, each event computed in a thread."""
        events = self.stream(input, config, **arguments)
        while (event := await run_in_executor(config, next, events, None)) is not None:
            yield event

    def _last(
        self, input: str, run_manager: CallbackManagerForChainRun, config: RunnableConfig, history: Turns = ()
    ) -> dict[str, Any]:
        events = list(self._transform(iter([input]), run_manager, config, history))
        value: dict[str, Any] = events[-1].value
        return value

    def _transform(
        self,
        questions: Iterator[str],
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        history: Turns = (),
    ) -> Iterator[Any]:
        for question in questions:
            yield from self._events(question, patch_config(config, callbacks=run_manager.get_child()), history)

    # Answering -----------------------------------------------------------------------------------------------------
    def _events(self, question: str, config: RunnableConfig, turns: Turns) -> Iterator[Event]:
        if not question.strip():
            raise UsageError("The question is empty.", "Ask one with --question.")
        answer = _Answer(self.strategy, self.model_name, fit_history(self.llm, turns))
        for event in self._work(question.strip(), answer, config):
            if isinstance(event, Notice):
                answer.notices.append(event.text)
            yield event
        yield UsageReport(answer.usage)
        yield Result(answer.value())

    def _work(self, question: str, answer: _Answer, config: RunnableConfig) -> Iterator[Event]:
        yield from self.prepare()
        answer.mark("index")
        passages, verdict = self._look_up(answer.history.searches(question))
        answer.mark("retrieve")
        prompts = load_prompts(language_of(question), self.prompt_file)
        if verdict.remark:
            yield Notice(verdict.remark)
        if not verdict.supported:
            answer.texts = [prompts.nothing_found]
            yield Step("answer", 1, 1)
            yield Token(prompts.nothing_found)
            return
        yield from self._language_notice(question)
        yield from self._ask(question, passages, prompts, answer, config)
        yield from answer.sources

    def _look_up(self, searches: Sequence[str]) -> tuple[list[Source], Verdict]:
        """Passages of the first search that finds something to go by, else of the last one."""
        for text in searches:
            passages = retrieve(self.retriever, text, self.search, merge=self.strategy == "stuff")
            verdict = self.evidence.judge(text, passages)
            if verdict.supported:
                break
        return passages, verdict

    def _language_notice(self, question: str) -> Iterator[Event]:
        if self.languages == "en" and language_of(question) == "zh":
            yield Notice(
                f"The model {self.model_name} knows English only; for Chinese name another one with --model "
                "(`calpaca models list`)."
            )

    def _ask(
        self, question: str, passages: Sequence[Source], prompts: Prompts, answer: _Answer, config: RunnableConfig
    ) -> Iterator[Event]:
        chain = self._chain(prompts, answer.history)
        if answer.history.left_out:
            yield Notice(f"Left out, to keep room for passages: the {answer.history.left_out} oldest messages.")
        fitting = fit(chain, question, passages, self.max_new_tokens)
        for passage in fitting.left_out:
            yield Notice(f"Left out, since the model's context is full: {place(passage)}.")
        answer.sources = fitting.kept
        # stuff: the best passage next to the question, which small models answer best from
        shown = fitting.kept[::-1] if self.strategy == "stuff" else fitting.kept
        inputs = chain_inputs(question, shown)
        steps = chain.steps(inputs["input_documents"])
        for piece in chain.pieces(inputs, config):
            if piece.step > len(answer.texts):
                answer.texts.append("")
                yield Step(_step_name(self.strategy, piece.step), piece.step, steps)
            if piece.text:
                answer.mark("first_token")
                answer.texts[-1] += piece.text
                yield Token(piece.text, piece.step)
            answer.usage += _usage(piece)

    def _chain(self, prompts: Prompts, history: History) -> DocumentChain:
        if self.strategy == "stuff":
            return StuffChain(
                self.llm,
                history.before(prompts.stuff),
                document_prompt=prompts.stuff_passage,
                document_separator=prompts.stuff_separator,
            )
        return RefineChain(
            self.llm,
            history.before(prompts.refine_question),
            history.before(prompts.refine),
            document_prompt=prompts.refine_passage,
        )


def place(passage: Source) -> str:
    """Where a passage stands, for people."""
    page = f", page {passage.page}" if passage.page is not None else ""
    lines = f", lines {passage.start}-{passage.end}" if passage.start is not None else ""
    return f"{passage.source or 'a passage'}{page}{lines}"


def _history(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The one argument beside the question; others are for other Runnables."""
    return {"history": arguments["history"]} if "history" in arguments else {}


def _step_name(strategy: Strategy, step: int) -> str:
    if strategy == "stuff":
        return "answer"
    return "first passage" if step == 1 else f"passage {step}"


def _usage(piece: Piece) -> Usage:
    used = piece.message.usage_metadata if piece.message is not None else None
    return Usage(used["input_tokens"], used["output_tokens"]) if used else Usage()


def _model_name(llm: BaseLanguageModel[Any]) -> str:
    for name in ("model", "model_name"):
        value = getattr(llm, name, None)
        if isinstance(value, str) and value:
            return value
    return type(llm).__name__


def _as_json(source: Source) -> dict[str, Any]:
    return {
        "source": source.source,
        "page": source.page,
        "start": source.start,
        "end": source.end,
        "text": source.text,
        "score": source.score,
    }
