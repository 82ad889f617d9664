"""`--evaluate`: the answerer measured on a set of questions, in one configuration or several side by side.

No model judges another: passages, answers and citations are compared with the expected ones by string. Each answer is a
step of the job ledger, named by the question, the configuration, the model's weights and the documents; an evaluation that
was cut short goes on where it ended, and one that is repeated asks nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from calpaca.cli.table import table
from calpaca.core.errors import UsageError
from calpaca.core.events import Event, Progress, Result, Source, Token
from calpaca.core.jobs import Job, step_key
from calpaca.core.runtime import Runtime
from calpaca.core.text_measures import contains_answer, exact_match, f1
from calpaca.documents.index import DocumentIndex
from calpaca.documents.retrieval import retrieve
from calpaca.plugins.options import read_options
from calpaca_retrieval_qa.answerer import RetrievalQA
from calpaca_retrieval_qa.assembly import build_answerer
from calpaca_retrieval_qa.citations import without_markers
from calpaca_retrieval_qa.evalset import EvalQuestion, read_evalset
from calpaca_retrieval_qa.options import RetrievalQAOptions
from calpaca_retrieval_qa.recorded import RecordedWork
from calpaca_retrieval_qa.scores import Outcome, Scores, score

FORMAT = 1
"""Part of a step's key. Raised when the same answer is measured in another way."""

_DEPTH = 10
"""Passages among which the right one is looked for."""


@dataclass(frozen=True)
class Configuration:
    """Options under the name they are shown by, the answerer that has them, and its index."""

    name: str
    options: RetrievalQAOptions
    qa: RetrievalQA
    index: DocumentIndex
    fingerprint: str

    def key(self, question: EvalQuestion) -> str:
        """The step that answers a question."""
        chosen = self.options.model_dump(mode="json", exclude={"files", *_MODES})
        return step_key(
            "evaluation", format=FORMAT, question=question.model_dump(mode="json"), options=chosen,
            model=self.fingerprint, embedder=self.index.embedder.fingerprint, files=self.index.manifest.files(),
            evidence=repr(self.qa.evidence), reranker=self.qa.reranker.fingerprint if self.qa.reranker else None,
        )  # fmt: skip


_MODES = {"evaluate", "compare", "parallel", "make_evalset", "drafts", "calibrate", "question", "session"}
"""Options that say what is done, not how a question is answered."""


class Evaluation:
    """An evaluation of some configurations on one set."""

    def __init__(
        self, configurations: Sequence[Configuration], questions: Sequence[EvalQuestion], parallel: int
    ) -> None:
        self.configurations = configurations
        self.questions = questions
        self.parallel = parallel

    def work(self, job: Job) -> Iterator[Event]:
        """Answer what is not answered yet, then give out the table and the figures."""
        job.expect(len(self.configurations) * len(self.questions))
        scores: dict[str, Scores] = {}
        for configuration in self.configurations:
            outcomes: dict[int, Outcome] = {}
            for position, value in self._answered(job, configuration):
                outcomes[position] = Outcome.from_json(json.loads(value))
                yield Progress(job.done, job.total, "questions", configuration.name)
            ordered = [outcomes[position] for position in range(len(self.questions))]
            scores[configuration.name] = score(ordered, configuration.options.k)
        yield Token(as_table(scores))
        yield Result({"configurations": {name: each.as_dict() for name, each in scores.items()}, "job": job.id})

    def _answered(self, job: Job, configuration: Configuration) -> Iterator[tuple[int, bytes]]:
        keys = [configuration.key(question) for question in self.questions]

        def work(positions: list[int]) -> Mapping[int, bytes]:
            with ThreadPoolExecutor(self.parallel) as threads:
                outcomes = threads.map(lambda position: measure(configuration.qa, self.questions[position]), positions)
                return {
                    position: json.dumps(asdict(outcome)).encode()
                    for position, outcome in zip(positions, outcomes, strict=True)
                }

        return job.steps("evaluation", keys, work, self.parallel)


def measure(qa: RetrievalQA, question: EvalQuestion) -> Outcome:
    """Ask a question and compare what comes with what is expected."""
    search = replace(qa.search, k=max(_DEPTH, qa.search.k))
    found = retrieve(qa.retriever, question.question, search, reranker=qa.reranker, merge=False)
    ranks = (rank for rank, passage in enumerate(found, 1) if _holds(question, passage))
    started = time.perf_counter()
    value = qa.invoke(question.question)
    seconds = time.perf_counter() - started
    answer = without_markers(value["answer"])[0] if value["supported"] else ""
    return Outcome(
        answerable=question.answerable,
        supported=value["supported"],
        rank=next(ranks, 0),
        exact=exact_match(answer, question.answers),
        f1=f1(answer, question.answers),
        right=contains_answer(answer, question.answers),
        citations=tuple(
            question.holds(cited["source"], cited["page"], cited["quote"], cited["offsets"])
            for cited in value.get("citations", ())
        ),
        seconds=seconds,
        prompt_tokens=value["usage"]["prompt_tokens"],
        completion_tokens=value["usage"]["completion_tokens"],
    )


def _holds(question: EvalQuestion, passage: Source) -> bool:
    start, end = passage.metadata.get("start"), passage.metadata.get("end")
    place = (start, end) if start is not None and end is not None else None
    return question.holds(passage.source, passage.page, passage.text, place)


def as_table(scores: Mapping[str, Scores]) -> str:
    """A row for each measure, a column for each configuration."""
    names = [field.name for field in fields(Scores)]
    values = [each.as_dict() for each in scores.values()]
    rows = [[name.replace("_", " "), *(_figure(value[name]) for value in values)] for name in names]
    return table(["", *scores], rows)


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


# Configurations -----------------------------------------------------------------------------------------------------
def build_evaluation(options: RetrievalQAOptions, runtime: Runtime) -> RecordedWork:
    """The job of `--evaluate`. Raises UsageError for a wrong set or a wrong configuration."""
    assert options.evaluate is not None
    questions = read_evalset(options.evaluate)
    if options.parallel < 1:
        raise UsageError(f"--parallel is {options.parallel}.", "Give the number of questions asked at once, such as 8.")
    wanted = {"as given": options} | {each: _changed(options, each) for each in options.compare}
    configurations: list[Configuration] = []
    for name, chosen in wanted.items():
        qa, index = build_answerer(chosen, runtime)
        fingerprint = runtime.model(chosen.spec()).fingerprint
        configurations.append(Configuration(name, chosen, qa, index, fingerprint))
    evaluation = Evaluation(configurations, questions, options.parallel)

    def prepare() -> Iterator[Event]:
        for configuration in configurations:
            yield from configuration.qa.prepare()

    title = f"Evaluate {options.evaluate} in {len(configurations)} configurations"
    return RecordedWork(runtime, title, options.parameters(), evaluation.work, prepare)


def _changed(options: RetrievalQAOptions, changes: str) -> RetrievalQAOptions:
    """The options with some of them set anew: `search=hybrid,k=8`."""
    values: dict[str, Any] = options.model_dump(exclude_unset=True)
    for change in changes.split(","):
        name, equals, value = change.partition("=")
        if not equals:
            raise UsageError(
                f"--compare '{changes}': '{change}' sets nothing.", "Write NAME=VALUE, as in search=hybrid,k=8."
            )
        field = name.strip().replace("-", "_")
        if field in _MODES:
            raise UsageError(
                f"--compare '{changes}': {name.strip()} cannot be compared.", "Compare options of the answer."
            )
        values[field] = value.strip()
    chosen = read_options(RetrievalQAOptions, values, "retrieval_qa --compare")
    assert isinstance(chosen, RetrievalQAOptions)
    return chosen
