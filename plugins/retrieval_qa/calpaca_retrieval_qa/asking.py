"""From a plan to the answer that is shown: the model is asked, and what it says is checked as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from langchain_core.runnables import RunnableConfig

from calpaca.core.errors import ContextOverflowError
from calpaca.core.events import Event, Notice, Source, Step, Token
from calpaca_retrieval_qa.budget import chain_inputs
from calpaca_retrieval_qa.chains import Piece
from calpaca_retrieval_qa.citations import CitationChecker
from calpaca_retrieval_qa.map_rerank import MapRerankChain
from calpaca_retrieval_qa.options import CiteMode
from calpaca_retrieval_qa.prompts import Prompts
from calpaca_retrieval_qa.record import AnswerRecord
from calpaca_retrieval_qa.strategies import Plan


def ask(plan: Plan, record: AnswerRecord, cite: CiteMode, prompts: Prompts, config: RunnableConfig) -> Iterator[Event]:
    """Steps and tokens of the answer, and notices of what was left out. What is learnt stands in the record."""
    yield from _left_out(plan, record)
    record.strategy, record.passages = plan.strategy, list(plan.ranked)
    if cite != "off":
        checker = CitationChecker(cite, record.standalone, plan.citable)
        record.cited = checker.answer
    else:
        checker = None
    try:
        yield from _Asking(plan, record, checker).events(config)
    except ContextOverflowError as error:
        error.hint = f"{error.hint} Smaller chunks take less: --chunk-size."
        raise
    if not record.text.strip():
        yield from nothing_found(record, prompts)
    yield from _citation_notices(record)


def nothing_found(record: AnswerRecord, prompts: Prompts) -> Iterator[Event]:
    """Say that the documents hold no answer."""
    record.supported = False
    record.text = prompts.nothing_found
    if not record.steps:
        yield Step("answer", 1, 1)
    yield Token(prompts.nothing_found, max(1, len(record.steps)))


class _Asking:
    """A chain at work: its pieces become events, those of the answer itself after they are checked."""

    def __init__(self, plan: Plan, record: AnswerRecord, checker: CitationChecker | None) -> None:
        self.plan = plan
        self.record = record
        self.checker = checker
        self.prompt_tokens: list[int] = []

    def events(self, config: RunnableConfig) -> Iterator[Event]:
        inputs = chain_inputs(self.record.standalone, self.plan.shown, self.plan.ranked)
        chooses = isinstance(self.plan.chain, MapRerankChain)
        total = self.plan.chain.steps(inputs["input_documents"]) + chooses
        whole: list[Piece] = []
        for piece in self.plan.chain.pieces(inputs, config):
            yield from self._begin(piece, total)
            if piece.text:
                self.record.mark("first_token")
                self.record.steps[-1] += piece.text
                text = self._checked(piece.text) if piece.step == total else piece.text
                yield from _token(text, piece.step)
            if tokens := self.record.count(piece.message):
                self.prompt_tokens.append(tokens)
            whole.append(piece)
        if chooses:
            answer = self.plan.chain.output(whole, inputs["input_documents"])["output_text"]
            yield Step("best answer", total, total)
            yield from _token(self._checked(answer), total)
        if self.checker is not None:
            yield from _token(self._shown(self.checker.finish()), total)
        self._report()

    def _begin(self, piece: Piece, total: int) -> Iterator[Event]:
        if piece.step > len(self.record.steps):
            self.record.steps.append("")
            yield Step(_step_name(self.plan.strategy, piece.step), piece.step, total)

    def _checked(self, text: str) -> str:
        return self._shown(self.checker.feed(text) if self.checker is not None else text)

    def _shown(self, text: str) -> str:
        self.record.text += text
        return text

    def _report(self) -> None:
        """What was sent, as the engine counted it."""
        sent = self.prompt_tokens
        self.record.context = replace(
            self.plan.use, sent_tokens=sum(sent), prompts=len(self.record.steps), largest_prompt=max(sent, default=0)
        )


def _token(text: str, step: int) -> Iterator[Event]:
    if text:
        yield Token(text, step)


def _step_name(strategy: str, step: int) -> str:
    if strategy == "stuff":
        return "answer"
    return "first passage" if step == 1 and strategy == "refine" else f"passage {step}"


def _left_out(plan: Plan, record: AnswerRecord) -> Iterator[Event]:
    if record.history.left_out:
        yield Notice(f"Left out, to keep room for passages: the {record.history.left_out} oldest messages.")
    for passage in plan.left_out:
        became = "Summed up" if plan.use.summary is not None else "Left out"
        yield Notice(f"{became}, since the model's context is full: {place(passage)}.")


def _citation_notices(record: AnswerRecord) -> Iterator[Event]:
    """What was removed, and that an answer rests on nothing that can be shown."""
    cited = record.cited
    if cited is None:
        return
    if cited.removed_claims:
        yield Notice(f"Left out, since no passage backs it: {_counted(len(cited.removed_claims), 'sentence')}.")
    if cited.removed_markers:
        yield Notice(f"Removed: {_counted(cited.removed_markers, 'citation')} that the model made up.")
    if cited.uncited and not cited.citations and record.supported:
        yield Notice("No sentence of the answer could be found in the documents. The sources are what the model read.")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


def place(passage: Source) -> str:
    """Where a passage stands, for people."""
    return ", ".join(filter(None, (passage.source or "a passage", passage.place)))
