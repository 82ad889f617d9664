"""Questions answered from passages: look up, check that there is something to go by, ask the model, check what it says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForChainRun
from langchain_core.language_models import BaseLanguageModel
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import patch_config, run_in_executor
from langchain_core.vectorstores import VectorStore

from calpaca.core.context import ContextPolicy
from calpaca.core.errors import UsageError
from calpaca.core.events import ContextReport, Event, Notice, Result, Source, UsageReport
from calpaca.core.language import language_of
from calpaca.core.reranker import Reranker
from calpaca.documents.retrieval import Search, retrieve
from calpaca_retrieval_qa.asking import ask, nothing_found
from calpaca_retrieval_qa.evidence import EvidenceRule, Verdict
from calpaca_retrieval_qa.history import fit_history
from calpaca_retrieval_qa.options import CiteMode, Strategy
from calpaca_retrieval_qa.prompts import Prompts, load_prompts
from calpaca_retrieval_qa.record import AnswerRecord
from calpaca_retrieval_qa.rewriting import rewrite, stands_alone
from calpaca_retrieval_qa.session import KeptConversation
from calpaca_retrieval_qa.strategies import Planner

Turns = Sequence[Mapping[str, str]]


class RetrievalQA(Runnable[str, Any]):
    """Answers questions from what a retriever or vector store finds.

    Any chat model or LLM and any retriever or store of langchain-core will do:

        RetrievalQA(llm=ChatCalpaca(), retriever=store).invoke("Who keeps the key?")["answer"]

    `stream` gives calpaca's events, the last one a Result; `invoke` gives that result's value. `prepare` is run before
    each question, to bring an index up to date. Prompts are those of the question's language, or of `prompt_file`.
    `max_new_tokens` is the room kept for the answer when passages are fitted into the context; `context_policy` says what
    becomes of those without room. A `reranker` orders what was found anew. `cite` is told in `citations`, `strategy` in `strategies`.

    `history`, an argument of each of them, are the earlier turns of the conversation (`role` and `content`, oldest first);
    a `session` has its own, and keeps what is asked and answered. A question that refers to them is rewritten by the model with `rewrites`; where that fails,
    it is looked up together with the question before it, and the model is shown the turns.
    """

    def __init__(
        self,
        llm: BaseLanguageModel[Any],
        retriever: VectorStore | BaseRetriever,
        *,
        strategy: Strategy = "stuff",
        search: Search = Search(),
        reranker: Reranker | None = None,
        cite: CiteMode = "loose",
        context_policy: ContextPolicy = "drop",
        prompt_file: Path | None = None,
        evidence: EvidenceRule = EvidenceRule(),
        prepare: Callable[[], Iterator[Event]] = lambda: iter(()),
        session: KeptConversation | None = None,
        rewrites: bool = True,
        max_new_tokens: int | None = None,
        model_name: str = "",
        languages: str = "",
    ) -> None:
        self.llm = llm
        self.retriever = retriever
        self.strategy = strategy
        self.search = search
        self.reranker = reranker
        self.cite = cite
        self.context_policy = context_policy
        self.prompt_file = prompt_file
        self.evidence = evidence
        self.prepare = prepare
        self.session = session
        self.rewrites = rewrites
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
        turns = self.session.turns() if self.session is not None else turns
        record = AnswerRecord(question.strip(), self.model_name, fit_history(self.llm, turns), self.strategy)
        for event in self._work(record, config):
            if isinstance(event, Notice):
                record.notices.append(event.text)
            yield event
        value = record.value()
        if self.session is not None:
            self.session.keep(record.question, value)
        yield UsageReport(record.usage)
        if record.context is not None:
            yield ContextReport(record.context)
        yield Result(value)

    def _work(self, record: AnswerRecord, config: RunnableConfig) -> Iterator[Event]:
        yield from self.prepare()
        record.mark("index")
        prompts = load_prompts(language_of(record.question), self.prompt_file)
        searches = yield from self._searches(record, prompts, config)
        passages, verdict = self._look_up(searches, record)
        record.mark("retrieve")
        if verdict.remark:
            yield Notice(verdict.remark)
        if not verdict.supported:
            yield from nothing_found(record, prompts)
            return
        yield from self._language_notices(record.question)
        policy, room = self.context_policy, self.max_new_tokens
        planner = Planner(self.llm, prompts, record.history, self.strategy, policy, room)
        plan = planner.plan(record.standalone, passages, config)
        yield from ask(plan, record, self.cite, prompts, config)
        yield from record.sources()

    def _searches(
        self, record: AnswerRecord, prompts: Prompts, config: RunnableConfig
    ) -> Generator[Event, None, Sequence[str]]:
        """What is looked up, until something is found."""
        if record.history.messages and stands_alone(record.question):
            record.history = replace(record.history, messages=())
        if not record.history.messages or not self.rewrites:
            return record.history.searches(record.question)
        rewritten = rewrite(self.llm, prompts.follow_up, record.history, record.question, config)
        record.count(rewritten.message)
        record.mark("rewrite")
        if not rewritten.question:
            return record.history.searches(record.question)
        if rewritten.question != record.question:
            yield Notice(f"Understood as: {rewritten.question}")
        record.rewritten = rewritten.question
        record.history = replace(record.history, messages=())  # the question says it all now
        return [rewritten.question]

    def _look_up(self, searches: Sequence[str], record: AnswerRecord) -> tuple[list[Source], Verdict]:
        """Passages of the first search that finds something to go by, else of the last one."""
        merge = self.strategy in ("stuff", "auto")
        for text in searches:
            record.searched = text
            passages = retrieve(self.retriever, text, self.search, reranker=self.reranker, merge=merge)
            verdict = self.evidence.judge(text, passages)
            if verdict.supported:
                break
        return passages, verdict

    def _language_notices(self, question: str) -> Iterator[Event]:
        """What to say when a Chinese question is put to models of English."""
        if language_of(question) != "zh":
            return
        if self.languages == "en":
            yield Notice(
                f"The model {self.model_name} knows English only; for Chinese name another one with --model "
                "(`calpaca models list`)."
            )
        if self.reranker is not None and self.reranker.languages == "en":
            yield Notice(
                f"The reranker {self.reranker.name} knows English only: Chinese passages are found better without it."
            )


def _history(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The one argument beside the question; others are for other Runnables."""
    return {"history": arguments["history"]} if "history" in arguments else {}


def _model_name(llm: BaseLanguageModel[Any]) -> str:
    for name in ("model", "model_name"):
        value = getattr(llm, name, None)
        if isinstance(value, str) and value:
            return value
    return type(llm).__name__
