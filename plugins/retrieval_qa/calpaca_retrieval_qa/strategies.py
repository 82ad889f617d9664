"""How a question is put to the model: which chain, with which passages, and what becomes of those without room.

| strategy     | prompts                                                                                     |
| `stuff`      | one, with all passages                                                                      |
| `refine`     | one for each passage, each improving the answer                                             |
| `map_rerank` | one for each passage, all at once; the answer wins that a passage backs with most of the question's words |
| `auto`       | `stuff` when the rendered prompt with all passages leaves room for the answer, else `map_rerank` |

Instructions and passages come first and the question last, so that another question about the same passages finds the
beginning of its prompt in the engine's prefix cache. In `stuff` the best passage stands last: in the order of their
documents, which more questions would share, SmolLM2-135M answered 10 questions of twelve about the handbook instead of 11
(of 48 about XQuAD 20 either way).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.documents import Document
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableConfig

from calpaca.core.context import ContextPolicy, ContextUse
from calpaca.core.context_summary import longest_fitting
from calpaca.core.errors import ContextOverflowError
from calpaca.core.events import Source
from calpaca_retrieval_qa.budget import Fitting, answer_room, context_length, count_tokens, fit, prompt_tokens
from calpaca_retrieval_qa.chains import DocumentChain, Piece, RefineChain, StuffChain
from calpaca_retrieval_qa.citations import CitationChecker
from calpaca_retrieval_qa.facts import Statements, facts
from calpaca_retrieval_qa.history import History
from calpaca_retrieval_qa.map_rerank import MapRerankChain
from calpaca_retrieval_qa.options import Strategy
from calpaca_retrieval_qa.prompts import Prompts

_SUMMARY_SHARE = 8
"""Of the context, one part in so many is kept for the summary of passages without room."""


@dataclass(frozen=True)
class Plan:
    """What will be asked: the passages as they are `ranked`, best first, and as they are `shown` in the prompts.

    Both hold the summary of what found no room, where there is one; it is no document's text and cannot be cited.
    """

    strategy: Strategy
    chain: DocumentChain
    ranked: list[Source]
    shown: list[Source]
    left_out: list[Source]
    use: ContextUse

    @property
    def citable(self) -> list[Source]:
        """The passages that are a document's own text."""
        return [passage for passage in self.ranked if passage.text != self.use.summary]


@dataclass(frozen=True)
class Planner:
    """Makes a Plan. `max_new_tokens` is the room for the answer, where it is given."""

    llm: Any
    prompts: Prompts
    history: History
    strategy: Strategy = "stuff"
    policy: ContextPolicy = "drop"
    max_new_tokens: int | None = None

    def plan(self, question: str, passages: Sequence[Source], config: RunnableConfig | None = None) -> Plan:
        """Raises ContextOverflowError under the policy `error` when a passage finds no room."""
        strategy, fitting = self._choose(question, passages)
        chain = self._chain(strategy, question)
        use = self._use(chain, question, passages, fitting)
        if fitting.left_out and self.policy == "error":
            raise ContextOverflowError(
                use.largest_prompt + use.dropped_tokens, use.answer_tokens, use.context_length or 0
            )
        shown = fitting.kept[::-1] if strategy == "stuff" else fitting.kept
        plan = Plan(strategy, chain, fitting.kept, shown, fitting.left_out, use)
        return self._with_summary(plan, question, config) if fitting.left_out and self.policy == "summarise" else plan

    def _choose(self, question: str, passages: Sequence[Source]) -> tuple[Strategy, Fitting]:
        first: Strategy = "stuff" if self.strategy == "auto" else self.strategy
        fitting = fit(self._chain(first, question), question, passages, self.max_new_tokens)
        if fitting.left_out and first == "stuff" and (self.strategy == "auto" or self.policy == "refine"):
            first = "map_rerank" if self.strategy == "auto" else "refine"
            fitting = fit(self._chain(first, question), question, passages, self.max_new_tokens)
        return first, fitting

    def _chain(self, strategy: Strategy, question: str) -> DocumentChain:
        prompts, before = self.prompts, self.history.before
        if strategy == "stuff":
            return StuffChain(
                self.llm,
                before(prompts.stuff),
                document_prompt=prompts.stuff_passage,
                document_separator=prompts.stuff_separator,
            )
        if strategy == "refine":
            first, further = before(prompts.refine_question), before(prompts.refine)
            return RefineChain(self.llm, first, further, document_prompt=prompts.refine_passage)
        return MapRerankChain(
            self.llm,
            before(prompts.map_rerank),
            document_prompt=prompts.map_rerank_passage,
            rate=Backing(question),
        )

    def _use(self, chain: DocumentChain, question: str, passages: Sequence[Source], fitting: Fitting) -> ContextUse:
        limit = context_length(self.llm)
        use = ContextUse(self.policy, limit, answer_room(self.max_new_tokens), unit="passage")
        if not fitting.left_out:
            return use
        sent = prompt_tokens(chain, question, fitting.kept)
        lost = prompt_tokens(chain, question, passages) - sent
        return replace(use, largest_prompt=sent, dropped=len(fitting.left_out), dropped_tokens=lost)

    def _with_summary(self, plan: Plan, question: str, config: RunnableConfig | None) -> Plan:
        """The plan with a summary of the passages that found no room as one more passage."""
        limit, answer = context_length(self.llm) or 0, answer_room(self.max_new_tokens)
        passages = [*plan.ranked, *plan.left_out]
        fitting = fit(plan.chain, question, passages, answer + limit // _SUMMARY_SHARE)
        written = self._summaries(fitting.left_out, question, limit - answer, config)

        def fits(text: str) -> bool:
            return prompt_tokens(plan.chain, question, [*fitting.kept, Source("", text)]) + answer <= limit

        summary = Source("", longest_fitting(written, fits))
        use = replace(self._use(plan.chain, question, passages, fitting), summary=summary.text)
        shown = [summary, *reversed(fitting.kept)]
        return replace(plan, ranked=[*fitting.kept, summary], shown=shown, left_out=fitting.left_out, use=use)

    def _summaries(self, passages: Sequence[Source], question: str, room: int, config: RunnableConfig | None) -> str:
        """What the model says that each passage says about the question; of a long passage, as much as it can read."""

        def prompt(text: str) -> PromptValue:
            return self.prompts.summary.invoke({"text": text, "question": question})

        texts = [
            longest_fitting(passage.text, lambda text: count_tokens(self.llm, prompt(text)) <= room)
            for passage in passages
        ]
        replies = self.llm.batch([prompt(text) for text in texts], config)
        return " ".join(reply if isinstance(reply, str) else str(reply.text).strip() for reply in replies)


@dataclass(frozen=True)
class Backing:
    """Rates the answers of `map_rerank`: by how many of the question's words stand in what backs the answer.

    SmolLM2-135M chose a right answer for 13 of 24 questions of XQuAD so, and for 11 by its own log probabilities; for 15
    there was one.
    """

    question: str

    def __call__(self, piece: Piece, document: Document) -> Mapping[str, Any]:
        passage = Source("", str(document.metadata["text"]))
        checker = CitationChecker("loose", self.question, [passage])
        checker.feed(piece.text)
        checker.finish()
        asked = facts(self.question)
        backed = [len(Statements(citation.quote).held(asked)) for citation in checker.answer.citations]
        return {"answer": piece.text, "score": max(backed, default=-1)}
