"""When the documents hold nothing: the threshold, chosen on questions whose answer is known.

The scores of embedding models differ in scale (those of E5 lie between 0.7 and 0.95), so a threshold belongs to one
model's weights. `--calibrate set.jsonl` chooses it: each question of the set is looked up twice, in all documents and in
all but its own, which then hold no answer; questions without answers add to the second kind. On one half of the documents
the threshold is taken that tells the two kinds apart best (F1 of refusals), on the other half it is tested, and kept in
the data folder under the embedder's fingerprint. That of the catalogue's default comes with calpaca.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from calpaca.cli.table import table
from calpaca.core.embedding import Embedder
from calpaca.core.errors import UsageError
from calpaca.core.events import Event, Progress, Result, Source, Token
from calpaca.core.jobs import Job
from calpaca.core.paths import atomic_file, data_dir
from calpaca.core.runtime import Runtime
from calpaca.documents.retrieval import retrieve
from calpaca_retrieval_qa.evalset import EvalQuestion, read_evalset, split_by_source
from calpaca_retrieval_qa.evidence import E5_RULE, EvidenceRule, Kind, signal
from calpaca_retrieval_qa.indexing import start_job
from calpaca_retrieval_qa.options import RetrievalQAOptions
from calpaca_retrieval_qa.recorded import RecordedWork

_FETCHED = 200
"""Passages among which those of other documents are looked for."""

_LEAST = 8
"""Questions of each kind, in each half, below which a threshold would be luck."""


@dataclass(frozen=True)
class Sample:
    """The signal of a question, and whether what was looked up holds its answer."""

    kind: Kind
    signal: float
    answered: bool


@dataclass(frozen=True)
class Tested:
    """A threshold and what it does on documents that it was not chosen on."""

    threshold: float
    precision: float
    recall: float
    answerable: int
    unanswerable: int


# The rule in use ----------------------------------------------------------------------------------------------------
def rule_for(embedder: Embedder, chunk_size: int) -> EvidenceRule:
    """The rule for an embedder: the user's calibration of these weights, else calpaca's, else words alone."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(calibration_file(embedder.fingerprint).read_text(encoding="utf-8"))
        thresholds = {kind: float(tested["threshold"]) for kind, tested in kept["tested"].items()}
        other = f" of {kept['chunk_size']} tokens" if kept["chunk_size"] != chunk_size else ""
        return EvidenceRule(thresholds, embedder.name, f"calibrated with other chunks,{other}" if other else "")
    return E5_RULE if embedder.name == E5_RULE.embedder else EvidenceRule(embedder=embedder.name)


def calibration_file(fingerprint: str) -> Path:
    """Where the calibration of an embedder's weights lies."""
    return data_dir() / "calibrations" / f"{fingerprint.replace(':', '-')[:32]}.json"


# Choosing -----------------------------------------------------------------------------------------------------------
def choose(samples: Sequence[Sample]) -> float:
    """The threshold with the best F1 of refusals; in the middle of the gap that it lies in."""
    values = sorted({sample.signal for sample in samples})
    borders = [values[0], *((low + high) / 2 for low, high in pairwise(values))]

    def quality(threshold: float) -> float:
        precision, recall = refusals(samples, threshold)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    return max(borders, key=quality)


def refusals(samples: Sequence[Sample], threshold: float) -> tuple[float, float]:
    """Precision and recall of refusing what lies below a threshold."""
    refused = [sample for sample in samples if sample.signal < threshold]
    rightly = sum(not sample.answered for sample in refused)
    wanted = sum(not sample.answered for sample in samples)
    return rightly / len(refused) if refused else 0.0, rightly / wanted if wanted else 0.0


def calibrated(chosen_on: Sequence[Sample], tested_on: Sequence[Sample]) -> dict[Kind, Tested]:
    """A threshold for each kind of question that both halves have enough of. Raises UsageError when no kind has."""
    found: dict[Kind, Tested] = {}
    for kind in ("en", "zh", "across"):
        first = [sample for sample in chosen_on if sample.kind == kind]
        second = [sample for sample in tested_on if sample.kind == kind]
        counts = [
            sum(sample.answered is wanted for sample in half) for half in (first, second) for wanted in (True, False)
        ]
        if min(counts) >= _LEAST:
            threshold = choose(first)
            found[kind] = Tested(threshold, *refusals(second, threshold), counts[2], counts[3])
    if not found:
        raise UsageError(
            f"The set is too small for a threshold: {len(chosen_on)} and {len(tested_on)} look-ups in its halves.",
            f"Each half needs {_LEAST} questions that are answered and {_LEAST} that are not, about documents of their own.",
        )
    return found


# The job ------------------------------------------------------------------------------------------------------------
class Calibration:
    """Looks up the questions of a set and keeps what follows."""

    def __init__(self, options: RetrievalQAOptions, runtime: Runtime, questions: Sequence[EvalQuestion]) -> None:
        self.options = options
        self.questions = questions
        self.index = options.index(runtime, options.embedding)
        self.reranker = runtime.reranker(options.rerank) if options.rerank is not None else None
        self.prepare = lambda: self.index.sync(lambda: start_job(options, runtime))

    def work(self, job: Job) -> Iterator[Event]:
        """Give out the table of thresholds after they were written down."""
        job.expect(len(self.questions))
        halves: list[list[Sample]] = []
        for half in split_by_source(self.questions):
            samples: list[Sample] = []
            for question in half:
                samples += self._samples(question)
                job.done += 1
                yield Progress(job.done, job.total, "questions", "Calibrating")
            halves.append(samples)
        tested = calibrated(*halves)
        file = calibration_file(self.index.embedder.fingerprint)
        value = self._value(tested)
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")
        yield Token(as_table(tested))
        yield Result({**value, "file": str(file), "job": job.id})

    def _value(self, tested: Mapping[Kind, Tested]) -> dict[str, Any]:
        embedder = self.index.embedder
        return {
            "embedder": embedder.name,
            "fingerprint": embedder.fingerprint,
            "chunk_size": self.options.chunk_size,
            "k": self.options.k,
            "tested": {kind: asdict(each) for kind, each in tested.items()},
            "time": time.time(),
        }

    def _samples(self, question: EvalQuestion) -> Iterator[Sample]:
        """What is found with the question's document and, where it has one, without it."""
        search = replace(self.options.chosen_search(), k=_FETCHED)
        found = retrieve(self.index.retriever, question.question, search, reranker=self.reranker, merge=False)
        yield from self._sample(question, found, answered=question.answerable)
        if question.answerable and question.source is not None:
            others = [passage for passage in found if not passage.source.endswith(question.source)]
            yield from self._sample(question, others, answered=False)

    def _sample(self, question: EvalQuestion, found: Sequence[Source], *, answered: bool) -> Iterator[Sample]:
        judged = signal(question.question, found[: self.options.k])
        if judged is not None:
            yield Sample(judged.kind, judged.value, answered)


def build_calibration(options: RetrievalQAOptions, runtime: Runtime) -> RecordedWork:
    """The job of `--calibrate`. Raises UsageError for a wrong set."""
    assert options.calibrate is not None
    calibration = Calibration(options, runtime, read_evalset(options.calibrate))
    title = f"Calibrate on {options.calibrate}"
    return RecordedWork(runtime, title, options.parameters(), calibration.work, calibration.prepare)


_KINDS = {"en": "other than Chinese", "zh": "Chinese", "across": "another language than the documents"}


def as_table(tested: Mapping[Kind, Tested]) -> str:
    """Thresholds, and how they do on the half that they were not chosen on."""
    rows = [
        [_KINDS[kind], f"{each.threshold:.3f}", f"{each.precision:.3f}", f"{each.recall:.3f}", f"{each.answerable} + {each.unanswerable}"]
        for kind, each in tested.items()
    ]  # fmt: skip
    return table(["questions", "threshold", "precision", "recall", "tested on"], rows)
