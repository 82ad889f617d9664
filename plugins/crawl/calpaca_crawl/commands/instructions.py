"""`calpaca crawl instructions`: rows of instruction data, made by language models."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.flags import flags, group_of
from calpaca.cli.run import AppCommand, answers_only, shared_runtime, was_typed
from calpaca.core.errors import JobError, UsageError
from calpaca.plugins.options import read_options
from calpaca_crawl.instruction_options import InstructionOptions
from calpaca_crawl.prompts import Prompts

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime
    from calpaca_crawl.generator import Generator
    from calpaca_crawl.methods import Setup
    from calpaca_crawl.output import Output
    from calpaca_crawl.run import Run
    from calpaca_crawl.scorer import Scorer

_TOKENS_OF_A_ROW = 220
"""What a row of modest length takes."""
_FIRST_BATCH = 8


@click.pass_context
def _instructions(ctx: click.Context, /, output: Path | None, **values: Any) -> None:
    typed = {name: value for name, value in values.items() if was_typed(ctx, name)}
    as_json = typed.pop("_json", False)
    options = read_options(InstructionOptions, typed, "crawl instructions")
    assert isinstance(options, InstructionOptions)
    prompts = Prompts(options.language, options.prompts)
    if options.write_prompts is not None:
        for file in prompts.copy_to(options.write_prompts):
            click.echo(file)
        return
    if output is None:
        raise UsageError("No file for the rows is named.", "Give one: calpaca crawl instructions rows.jsonl")
    with answers_only() as out:
        figures = make(options, prompts, output)
        out.write(json.dumps({"output": str(output), **figures}, ensure_ascii=False) if as_json else str(output))
        out.write("\n")


def make(options: InstructionOptions, prompts: Prompts, path: Path) -> dict[str, Any]:
    """Make rows into the file `path`, and give the report's figures. Raises CalpacaError."""
    from calpaca_crawl.attempts import Attempts
    from calpaca_crawl.budget import Spending
    from calpaca_crawl.filters import Filters
    from calpaca_crawl.methods import METHODS, Method
    from calpaca_crawl.output import Output
    from calpaca_crawl.run import KIND, Run

    runtime = shared_runtime()
    setup = _setup(options, prompts, runtime)
    methods: dict[str, Method] = {name: METHODS[name](setup) for name in options.methods}
    output = Output(path)
    generators, judge = _generators(options, runtime)
    pool = _pool(options, setup, [*generators, *filter(None, [judge])])
    if not options.overwrite:
        output.check(pool)
    filters = Filters(_limits(options, prompts))
    filters.pool.threshold = options.similarity
    filters.add_known(seed.row.question for seed in setup.seeds)
    job = runtime.jobs.start(KIND, f"Make rows for {path}", _parameters(pool))
    sampling = _sampling(options, setup, runtime)
    spending = Spending(options.budget)
    attempts = Attempts(runtime.jobs, pool)
    run = Run(generators, methods, filters, sampling, spending, job, attempts, options.in_flight)
    run.scorer = _scorer(judge, options, prompts, run)
    with job, _written(run, output, options, pool) as figures:
        _follow(run)
    return figures


# What the run is made of -----------------------------------------------------------------------------------------------


def _setup(options: InstructionOptions, prompts: Prompts, runtime: Runtime) -> Setup:
    from calpaca_crawl.methods import Setup, read_seeds
    from calpaca_crawl.sources import read_asked, read_passages, read_seed_rows

    for method, given, flag in (
        ("documents", options.documents, "--document"),
        ("answers", options.data_file, "--data-file"),
    ):
        if bool(given) != (method in options.methods):
            raise UsageError(f"{flag} and --method {method} belong together.", "Give both, or neither.")
    bootstrapped = {"self_instruct", "evolve"} & set(options.methods)
    rows = read_seed_rows(options.seeds) if options.seeds else prompts.seeds() if bootstrapped else []
    seeds = read_seeds(rows)
    if bootstrapped and not seeds:
        raise UsageError("There is no row to begin from.", "Name a file of rows with --seeds.")
    return Setup(
        prompts=prompts,
        records=options.records,
        tokens=options.max_new_tokens or _TOKENS_OF_A_ROW * max(options.records, 2),
        turns=options.turns,
        seed=options.seed or 0,
        seeds=seeds,
        passages=read_passages(options.documents, runtime.loaders),
        instructions=read_asked(options.data_file) if options.data_file else [],
    )


def _generators(options: InstructionOptions, runtime: Runtime) -> tuple[list[Generator], Generator | None]:
    """The models that make rows, and the one that scores them, which may be one of these."""
    from calpaca.core.spec import ModelSpec
    from calpaca_crawl.generator import Generator

    runtime.attaches = runtime.settings.attach
    runtime.purpose = "load"
    specs = [options.spec(), *(ModelSpec(model=name) for name in options.generators)]
    generators = [Generator(runtime.model(spec), options.constrained) for spec in specs]
    if options.score is None:
        return generators, None
    named = next((each for each, spec in zip(generators, specs, strict=True) if spec.model == options.score), None)
    return generators, named or Generator(runtime.model(ModelSpec(model=options.score)), options.constrained)


def _scorer(judge: Generator | None, options: InstructionOptions, prompts: Prompts, run: Run) -> Scorer | None:
    from calpaca_crawl.scorer import Scorer

    if judge is None:
        return None
    return Scorer(judge, prompts, options.min_score, run.job.ledger, run.spending, run.attempts)


def _limits(options: InstructionOptions, prompts: Prompts) -> Any:
    from calpaca_crawl.filters import Limits

    return Limits(
        shortest_answer=options.shortest_answer,
        longest_answer=options.longest_answer,
        language=None if options.any_language else options.language,
        refusals=options.keep_refusals,
        toxic=[word.casefold() for word in prompts.lines("toxic")],
    )


def _sampling(options: InstructionOptions, setup: Setup, runtime: Runtime) -> Any:
    """The options' sampling; where it is left to us, random, since a greedy model says everything once."""
    filled = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": setup.tokens}
    missing = {name: value for name, value in filled.items() if getattr(options, name) is None}
    return options.model_copy(update=missing).sampling(runtime.settings)


_NOT_OF_THE_POOL = {
    "max_rows", "max_tokens", "max_cost", "max_time", "price_in", "price_out", "overwrite", "form", "prompts",
    "write_prompts", "model", "adapters", "generators", "score", "seeds", "documents", "data_file", "device",
}  # fmt: skip
"""Options that change how much is made or where things lie, or whose contents are counted in by themselves."""


def _pool(options: InstructionOptions, setup: Setup, generators: list[Generator]) -> str:
    """What the rows follow from: a changed prompt, seed, document or model is another pool."""
    from calpaca.core.jobs import step_key

    names = ["topics", "tasks", "changes", "toxic"]
    texts = ["topics", "assignment", "self_instruct", "evolve", "documents", "dialogues", "format"]
    texts += ["score"] if options.score else []
    files = [*(f"{name}.txt" for name in names), *(f"{name}.md" for name in texts)]
    return step_key(
        "pool",
        prompts=[setup.prompts.text(name) for name in files],
        options=options.model_dump(mode="json", exclude=_NOT_OF_THE_POOL),
        seeds=[seed.id for seed in setup.seeds],
        passages=[passage.text for passage in setup.passages],
        instructions=[str(each.asked) for each in setup.instructions],
        models=[generator.model.fingerprint for generator in generators],
    )[:16]


def _parameters(pool: str) -> dict[str, Any]:
    """What `calpaca jobs resume` starts again."""
    return {"argv": list(click.get_current_context().obj or ()), "cwd": str(Path.cwd()), "pool": pool}


# The run ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _written(run: Run, output: Output, options: InstructionOptions, pool: str) -> Iterator[dict[str, Any]]:
    """The report's figures, filled in at the end. However a run ends, what it made is written."""
    from calpaca.core.jobs import JobCancelled
    from calpaca_crawl.report import draw, report

    figures: dict[str, Any] = {}
    try:
        yield figures
    except KeyboardInterrupt:
        run.stopped = "interrupted"
        raise JobCancelled(
            f"Cancelled with {len(run.kept)} rows, which are kept.", f"Go on with: calpaca jobs resume {run.job.id}"
        ) from None
    finally:
        figures |= report(run, pool)
        output.write(
            (row.written(options.form) for row in run.kept), (each.written() for each in run.rejected), figures
        )
        draw(figures, run.kept, output.picture)
    click.echo(_told(figures), err=True)
    if run.stopped == "all_asked" and not run.kept:
        raise JobError("No row was kept.", f"{output.rejected} says why for each record.")


def _follow(run: Run) -> None:
    """Make the rows under a bar, with a forecast once the first replies are there."""
    from tqdm import tqdm

    with tqdm(
        total=run.spending.budget.max_rows, unit=" row", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False,
        dynamic_ncols=True,
    ) as bar:  # fmt: skip

        def after_reply() -> None:
            bar.set_postfix(rejected=len(run.rejected), tokens=run.spending.spent.total_tokens)
            if run.replies == min(_FIRST_BATCH, run.in_flight):
                tqdm.write(f"Forecast: {run.spending.forecast(len(run.kept))}", file=sys.stderr)

        run.after_reply = after_reply
        for _ in run.rows():
            bar.update()


def _told(figures: dict[str, Any]) -> str:
    rejected = ", ".join(f"{count} {reason}" for reason, count in figures["rejected"].items()) or "none"
    return (
        f"{figures['rows']} rows of {figures['replies']} replies ({figures['reused_replies']} of them from before); "
        f"stopped by {figures['stopped']}. Rejected: {rejected}. "
        f"{figures['completion_tokens']} tokens generated{_lost(figures)}, {figures['seconds']} s."
    )


def _lost(figures: dict[str, Any]) -> str:
    lost = figures["lost_completion_tokens"]
    return f", at most {lost} more by requests without a reply" if lost else ""


_OUTPUT = click.Argument(["output"], type=click.Path(path_type=Path), required=False)
_JSON = click.Option(["_json", "--json"], is_flag=True, help="Print the report as one JSON object.")

instructions = AppCommand(
    "instructions",
    params=[
        _OUTPUT,
        *(flag for flag in flags("crawl instructions", InstructionOptions) if flag.name != "embedding"),
        _JSON,
    ],
    callback=_instructions,
    help="""Make instruction data with language models.

    Rows go to the JSONL file OUTPUT, in a form that trainers read. Beside it stand the rejected records with their reasons,
    a report and its picture. Any model will do, also that of an OpenAI-compatible server (--model
    http://host:8000/v1#name, its key in CALPACA_API_KEY). A run that was killed goes on where it ended: give the same
    command again; with a larger --max-rows it adds to its rows.
    """,
    groups={name: group_of(InstructionOptions, name) for name in InstructionOptions.model_fields},
)
