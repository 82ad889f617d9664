"""The gate: an adapter gets a name only if it answers held-out questions better than what there is without it.

Base, base with adapter and, where given, an app such as retrieval_qa answer the same questions. Each answer has a score,
and the scores are compared question by question (`calpaca_trainer.paired`). Whatever leaves a doubt (too few questions,
training data that is not known, a difference that may be chance) leaves the adapter without a name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from calpaca.core.engine import Sampling
from calpaca.core.errors import ModelError, UsageError
from calpaca.core.near_duplicates import THRESHOLD
from calpaca.core.sources import resolve_model
from calpaca.core.spec import ModelSpec
from calpaca.core.text_measures import contains_answer, f1
from calpaca.plugins.options import Flag, ModelOptions, SamplingOptions
from calpaca_trainer.errors import DataError
from calpaca_trainer.held_out import HeldOut, read_held_out
from calpaca_trainer.leakage import Leak, find_leaks, training_files
from calpaca_trainer.paired import PairedTest, compare
from calpaca_trainer.rows import Fault

if TYPE_CHECKING:
    from calpaca.core.jobs import Job
    from calpaca.core.model import Model
    from calpaca.core.runtime import Runtime

log = logging.getLogger("calpaca")

Measure = Literal["f1", "right", "likelihood"]
_MEASURES: dict[str, Callable[[str, HeldOut], float]] = {
    "f1": lambda answer, question: f1(answer, [question.wanted]),
    "right": lambda answer, question: float(contains_answer(answer, [question.wanted])),
}


class GateOptions(ModelOptions, SamplingOptions):
    """What is compared, on what, and how."""

    datasets: Annotated[list[str], Flag("dataset")] = Field(
        [], description="File or folder of questions that were kept from training; repeat for several."
    )
    trained_on: list[str] = Field(
        [], description="File or folder that was trained on; repeat. Left out: what the adapter's run folder says."
    )
    name: str | None = Field(None, description="Name that the adapter gets in the settings if it wins.")
    app: str | None = Field(None, description="App that it must beat too, such as retrieval_qa, with the base model.")
    files: Annotated[list[str], Flag("file")] = Field([], description="Document for that app; repeat for several.")
    measure: Measure = Field(
        "f1",
        description="f1: words shared with the wanted answer; right: it holds the wanted answer; likelihood: of the"
        " wanted answer, for each of its characters (no app).",
    )
    level: float = Field(0.05, gt=0, lt=1, description="Most probability of a difference by chance.")
    least: int = Field(30, ge=5, description="Fewest questions that may be judged by.")
    similarity: float = Field(THRESHOLD, gt=0, le=1, description="ROUGE-L from which a question counts as trained on.")


@dataclass(frozen=True)
class Gate:
    """Everything that is decided before a model is loaded."""

    options: GateOptions
    base: ModelSpec
    adapted: ModelSpec
    questions: Sequence[HeldOut]
    leaks: Sequence[Leak]
    faults: Sequence[Fault]


@dataclass(frozen=True)
class Answered:
    """What one of those compared says to each question (no text where likelihood is measured), and its scores."""

    name: str
    texts: Sequence[str]
    scores: Sequence[float]


@dataclass(frozen=True)
class Verdict:
    """The comparisons by the rival's name, and whether the adapter won every one of them."""

    tests: dict[str, PairedTest]
    wins: bool
    answered: Sequence[Answered] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"wins": self.wins, "comparisons": {name: asdict(test) for name, test in self.tests.items()}}


def prepare_gate(options: GateOptions, runtime: Runtime) -> Gate:
    """Read the questions and leave out those that were trained on.

    Raises UsageError for options that do not go together, DataError where it is not known what was trained on, or where
    too few questions are left.
    """
    _check(options)
    spec = options.spec()
    resolved = runtime.spec(spec)
    questions, faults = read_held_out(tuple(map(Path, options.datasets)))
    trained = list(map(Path, options.trained_on)) or training_files(Path(spec.adapters[-1].source))
    leaks = find_leaks(questions, trained, options.similarity)
    leaked = {leak.question.place for leak in leaks}
    left = [question for question in questions if question.place not in leaked]
    if len(left) < options.least:
        first = f" The first: {leaks[0]}." if leaks else ""
        raise DataError(
            f"There are {len(left)} questions to judge by, fewer than --least {options.least}: {len(questions)} were"
            f" read, {len(leaks)} of them were trained on.{first}",
            "Name more questions with --dataset.",
        )
    if resolved.model is None:  # the default of today, which a name must not leave to tomorrow's
        resolved = resolved.model_copy(update={"model": resolve_model(None, runtime, format="hf").name})
    base = resolved.model_copy(update={"adapters": resolved.adapters[:-1]})
    return Gate(options, base, resolved, left, leaks, faults)


def _check(options: GateOptions) -> None:
    if not options.adapters:
        raise UsageError("It is not said what is to be judged.", "Name a run folder with --adapter.")
    if not options.datasets:
        raise UsageError("There is nothing to measure on.", "Name rows that were not trained on with --dataset.")
    if options.app is not None and options.measure == "likelihood":
        raise UsageError("An app gives no likelihoods.", "Take --measure f1 or right with --app.")
    if options.files and options.app is None:
        raise UsageError("--file is for an app.", "Add --app retrieval_qa.")


def judge(gate: Gate, runtime: Runtime, job: Job) -> Verdict:
    """Let all of them answer, one after the other, and compare. Raises ModelError."""
    options = gate.options
    candidate = _of_model(gate, gate.adapted, "adapter", runtime, job)
    rivals = [_of_model(gate, gate.base, "base", runtime, job)]
    if options.app is not None:
        rivals.append(_of_app(gate, options.app, runtime))
    tests = {rival.name: compare(candidate.scores, rival.scores) for rival in rivals}
    wins = all(test.is_better(options.level) for test in tests.values())
    return Verdict(tests, wins, [*rivals, candidate])


def _of_model(gate: Gate, spec: ModelSpec, name: str, runtime: Runtime, job: Job) -> Answered:
    from calpaca.core.model import Model

    if gate.options.measure == "likelihood":  # asked of the one engine that tells it of a prompt's own tokens
        spec = spec.model_copy(update={"engine": "transformers"})
    log.info("Asking %s %d questions.", spec, len(gate.questions))
    model = Model.load(spec, runtime)
    try:
        if gate.options.measure == "likelihood":
            return Answered(name, [""] * len(gate.questions), _likelihoods(model, gate.questions))
        return _scored(gate, name, _answers(gate, model, gate.options.sampling(runtime.settings), job))
    finally:
        model.close()


def _answers(gate: Gate, model: Model, sampling: Sampling, job: Job) -> list[str]:
    """The model's answers. Raises ModelError for one that there is none to."""
    from calpaca.core.generation import Generation
    from calpaca.core.instructions import Instruction

    asked = [Instruction(question.question, question.asked) for question in gate.questions]
    texts = []
    for place, answer in Generation(model, asked, sampling, wrapped=True).answers(job):
        if answer.error is not None:
            raise ModelError(f"{gate.questions[place].place} has no answer: {answer.error}", "Take the row out.")
        texts.append(answer.text)
    return texts


def _scored(gate: Gate, name: str, texts: Sequence[str]) -> Answered:
    score = _MEASURES[gate.options.measure]
    pairs = zip(texts, gate.questions, strict=True)
    return Answered(name, texts, [score(text, question) for text, question in pairs])


def _of_app(gate: Gate, name: str, runtime: Runtime) -> Answered:
    """What an app answers that runs the base model."""
    from calpaca.plugins.instances import find_instance
    from calpaca.plugins.options import read_options

    instance = find_instance(name, runtime)
    known = instance.app.load_options()
    shared = {*ModelOptions.model_fields, *SamplingOptions.model_fields, "files"}
    given = gate.options.model_dump(include=shared, exclude_defaults=True)
    given |= {"adapters": gate.options.adapters[:-1]}
    typed = {key: value for key, value in given.items() if key in known.model_fields and value}
    runner = instance.app.build(read_options(known, {**instance.presets, **typed}, name), runtime)
    answers = [str(runner.invoke(question.question)[instance.app.answer]) for question in gate.questions]
    return _scored(gate, name, answers)


def _likelihoods(model: Model, questions: Sequence[HeldOut]) -> list[float]:
    """log p(wanted answer | question) for each of the answer's characters, which another vocabulary does not change."""
    from calpaca_trainer.prompting import load_prompting
    from calpaca_trainer.rendering import ConversationRenderer, Example

    assert model.files is not None
    prompting = load_prompting(model.files)
    length = model.context_length or 2**31
    renderer = ConversationRenderer(
        prompting.template, prompting.tokenizer, prompting.eos_ids, loss_on="last", max_length=length
    )
    found = []
    rendered = renderer.render(question.conversation for question in questions)
    for question, (example,) in zip(questions, rendered, strict=True):
        if not isinstance(example, Example):
            raise ModelError(
                f"{question.place} has {example.tokens} tokens, but the context holds {length}.", "Take the row out."
            )
        found.append(_likelihood(model, example) / max(len(question.wanted), 1))
    return found


def _likelihood(model: Model, example: Any) -> float:
    """The summed logarithms of the probabilities of the tokens that are learnt."""
    scored = model.generate(tuple(example.ids), Sampling(max_new_tokens=0), prompt_logprobs=0).result()
    ((start, end),) = example.spans
    return sum(each.logprob for each in scored.prompt_logprobs[start:end] if each is not None)
