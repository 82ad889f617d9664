"""Documents summed up: read, planned, asked for, accounted for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import run_in_executor

from calpaca.core.context import ContextUse
from calpaca.core.engine import Sampling, Usage
from calpaca.core.errors import UsageError
from calpaca.core.events import ContextReport, Event, Notice, Result, UsageReport
from calpaca.core.jobs import Job, JobRecord, id_of_job
from calpaca.core.model import Model
from calpaca.core.runtime import Runtime
from calpaca_summarize.asking import Asker, Taken
from calpaca_summarize.coverage import CoverageLedger
from calpaca_summarize.options import ANSWER_TOKENS, SummarizeOptions
from calpaca_summarize.plan import POLICIES, Plan, Planner
from calpaca_summarize.prompts import SummaryPrompts
from calpaca_summarize.source import Source, SourceText, read_source

APP = "summarize"
REPETITION_PENALTY = 1.1


@dataclass
class _Run:
    """One run: what was read, what was planned, what came of it."""

    source: Source
    model: Model
    plan: Plan
    job: Job | None
    started: float = field(default_factory=time.monotonic)
    summaries: list[str] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def coverage(self) -> CoverageLedger:
        ledger = CoverageLedger(self.source.texts, self.plan.chunks)
        for step in self.taken:
            for part in step.ask.parts:
                if step.answer.shown:
                    ledger.sent(part.index)
        return ledger

    def usage(self) -> Usage:
        """Tokens of this run; answers of the ledger cost none."""
        return sum((step.answer.usage for step in self.taken if not step.reused), Usage())

    def context(self) -> ContextUse:
        sent = [step.answer.usage for step in self.taken]
        tokens = [usage.prompt_tokens for usage in sent]
        return ContextUse(
            POLICIES[self.plan.strategy], self.model.context_length, self.plan.room.answer, sum(tokens), len(tokens),
            max(tokens), unit="chunk", estimated=any(usage.estimated for usage in sent),
        )  # fmt: skip


class Summarizer(Runnable[str, Any]):
    """Sums up the documents of its options, or the text that it is given where these name none.

    `stream` gives calpaca's events, the last one a Result; `invoke` gives that result's value. A text given to an object
    that has documents says what to attend to. Runs over documents are jobs: their steps are kept, and a run that was cut
    short goes on from there. Nothing is kept of a text that is given.
    """

    def __init__(self, options: SummarizeOptions, runtime: Runtime) -> None:
        self.options = options
        self.runtime = runtime
        self._job: Job | None = None

    # Runnable ------------------------------------------------------------------------------------------------------
    def invoke(self, input: str = "", config: RunnableConfig | None = None, **_: Any) -> dict[str, Any]:
        value: dict[str, Any] = self._call_with_config(lambda text: list(self._events(text))[-1].value, input, config)
        return value

    def stream(self, input: str = "", config: RunnableConfig | None = None, **_: Any) -> Iterator[Any]:
        """Events; the last one is a Result."""
        yield from self._transform_stream_with_config(iter([input]), self._transform, config)

    async def astream(self, input: str = "", config: RunnableConfig | None = None, **_: Any) -> AsyncIterator[Any]:
        """`stream`, each event computed in a thread."""
        events = self.stream(input, config)
        while (event := await run_in_executor(config, next, events, None)) is not None:
            yield event

    def _transform(self, inputs: Iterator[str]) -> Iterator[Any]:
        for text in inputs:
            yield from self._events(text)

    # A job ---------------------------------------------------------------------------------------------------------
    @property
    def id(self) -> str:
        return id_of_job(APP, self.options.job_parameters())

    def status(self) -> JobRecord:
        """Raises JobError before the documents were summed up once."""
        return self.runtime.jobs.get(self.id)

    def events(self) -> Iterator[Event]:
        """Sum up the documents; what earlier runs finished is not done again."""
        return self.stream()

    def cancel(self) -> None:
        """Stop before the next answer."""
        if self._job is not None:
            self._job.cancel()

    # The work ------------------------------------------------------------------------------------------------------
    def _events(self, text: str) -> Iterator[Any]:
        options, text = self.options, text.strip() or (self.options.text or "").strip()
        if options.files and text:
            options = options.model_copy(update={"focus": text})
        source = self._source(text)
        model = self.runtime.model(options.spec())
        sampling = self._sampling(options)
        prompts = SummaryPrompts(options.wishes(), "\n".join(each.text for each in source.texts))
        answer = options.max_new_tokens or ANSWER_TOKENS[options.length]
        planner = Planner(
            model, prompts, answer=answer, chunk_size=options.chunk_size, overlap=options.chunk_overlap
        )  # fmt: skip
        plan = planner.plan(source, options.strategy, by_section=options.by_section)
        with self._start(options) as job:
            run = _Run(source, model, plan, job)
            asker = Asker(model, sampling, plan.room, job, bullets=options.style == "bullets")
            yield from self._work(run, asker, prompts)

    def _sampling(self, options: SummarizeOptions) -> Sampling:
        """Unless something else is asked for, tokens that occurred are made a little less likely: without that, small
        models repeat a sentence until they are cut off."""
        sampling = options.sampling(self.runtime.settings)
        asked = options.repetition_penalty is not None or sampling.repetition_penalty != 1.0
        return sampling if asked else replace(sampling, repetition_penalty=REPETITION_PENALTY)

    def _source(self, text: str) -> Source:
        """Raises UsageError without anything to read, DocumentError for what cannot be read."""
        if self.options.files:
            return read_source(self.options.files, self.runtime.loaders)
        if not text:
            raise UsageError("There is no text to sum up.", "Name a file or folder with --file, or pipe a text in.")
        return Source([SourceText("text", text)])

    def _start(self, options: SummarizeOptions) -> Any:
        """The job of these options in the ledger; for a text that was given, none."""
        if not options.files:
            return nullcontext()
        names = ", ".join(path.name for path in options.files)
        self._job = self.runtime.jobs.start(APP, f"Summarize {names}", options.job_parameters())
        return self._job

    def _work(self, run: _Run, asker: Asker, prompts: SummaryPrompts) -> Iterator[Event]:
        by_section = self.options.by_section
        for path, reason in run.source.failed.items():
            yield self._note(run, f"Left out, since it cannot be read: {Path(path).name}. {reason}")
        steps = run.plan.steps(prompts, by_section=by_section)
        run.summaries = yield from asker.run(steps, run.plan.prompts(by_section=by_section))
        run.taken = asker.taken
        yield from self._account(run)
        yield UsageReport(run.usage())
        yield ContextReport(run.context())
        yield Result(self._value(run))

    def _account(self, run: _Run) -> Iterator[Notice]:
        if any(step.answer.cut for step in run.taken if step.ask.last):
            yield self._note(
                run, f"The summary was cut at {run.plan.room.answer} tokens; raise --max-new-tokens or --length."
            )
        if not all(run.summaries):
            yield self._note(run, "The model gave an empty summary.")
        covered = run.coverage().coverage
        reused = sum(step.reused for step in run.taken)
        kept = f", {reused} of them answered by earlier runs" if reused else ""
        yield self._note(
            run,
            f"Coverage {covered}: {run.source.characters:,} characters in {_counted(len(run.plan.chunks), 'chunk')}, "
            f"{_counted(len(run.taken), 'prompt')}{kept}.",
        )

    @staticmethod
    def _note(run: _Run, text: str) -> Notice:
        run.notices.append(text)
        return Notice(text)

    def _value(self, run: _Run) -> dict[str, Any]:
        """The result as `--json` prints it."""
        ledger, usage = run.coverage(), run.usage()
        sections = self._sections(run) if self.options.by_section else []
        return {
            "summary": _as_text(sections) if sections else run.summaries[0],
            **({"sections": sections} if sections else {}),
            "strategy": run.plan.strategy,
            "coverage": ledger.coverage,
            "coverage_counted_on": "token ids" if all(step.answer.ids for step in run.taken) else "messages",
            "characters": run.source.characters,
            "chunks": len(run.plan.chunks),
            "documents": ledger.by_text(),
            "failed": run.source.failed,
            "steps": [_as_json(step) for step in run.taken],
            "context": run.context().as_dict(),
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "total_tokens": usage.total_tokens,
            },
            "timings": {"total": round(time.monotonic() - run.started, 3)},
            "model": run.model.name,
            "job": run.job.id if run.job is not None else None,
            "notices": run.notices,
        }

    def _sections(self, run: _Run) -> list[dict[str, Any]]:
        found = []
        for (text, section, _), summary in zip(run.plan.sections, run.summaries, strict=True):
            source = run.source.texts[text]
            line = source.text.count("\n", 0, section.start) + 1
            title = section.title or Path(source.name).name
            found.append({"title": title, "source": source.name, "line": line, "summary": summary})
        return found


def _counted(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def _as_text(sections: list[dict[str, Any]]) -> str:
    return "\n\n".join(f"## {section['title']}\n\n{section['summary']}" for section in sections)


def _as_json(step: Taken) -> dict[str, Any]:
    return {
        "step": step.ask.step,
        "chunks": [part.index for part in step.ask.parts],
        "prompt_tokens": step.answer.usage.prompt_tokens,
        "completion_tokens": step.answer.usage.completion_tokens,
        "prompt_ids_sha256": step.answer.ids,
        "reused": step.reused,
        "text": step.answer.text,
    }
