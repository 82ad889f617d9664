"""`calpaca generate`: one instruction, or a file of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click
from pydantic import Field

from calpaca.cli.flags import flags, group_of
from calpaca.cli.run import AppCommand, answers_only, shared_runtime, was_typed
from calpaca.core.errors import JobError, UsageError
from calpaca.plugins.options import ModelOptions, SamplingOptions, read_options

if TYPE_CHECKING:
    from calpaca.core.engine import Sampling
    from calpaca.core.generation import Answer, Generation
    from calpaca.core.instructions import Instruction
    from calpaca.core.jobs import Job
    from calpaca.core.model import Model
    from calpaca.core.runtime import Runtime

_STDIN = Path("-")


class GenerateOptions(ModelOptions, SamplingOptions):
    """What `calpaca generate` is told."""

    prompt: str | None = Field(None, description="One instruction; its answer is printed as it comes.")
    data_file: Path | None = Field(
        None, description="Instructions: one on each line, or JSON or JSONL rows. - reads lines from stdin."
    )
    output: Path | None = Field(None, description="File for the answers to a data file; left out, they are printed.")
    format: Literal["jsonl", "seed"] = Field(
        "jsonl", description="jsonl, or seed: the predictions.json of Chinese-LLaMA-Alpaca's inference_hf.py."
    )
    with_prompt: bool | None = Field(
        None, description="Put each instruction into the model's chat template. Left out: where the model brings one."
    )
    system: str | None = Field(None, description="System text before each instruction.")
    template: str | None = Field(
        None, description="An instruction from a row's fields, such as 'Translate: {text}'; a line is {instruction}."
    )
    in_flight: int = Field(64, ge=1, description="Requests with the engine at once.")
    overwrite: bool = Field(False, description="Replace an output file that is there.")


@click.pass_context
def _generate(ctx: click.Context, /, **values: Any) -> None:
    typed = {name: value for name, value in values.items() if was_typed(ctx, name)}
    as_json = typed.pop("_json", False)
    options = _read(typed)
    with answers_only() as out:
        if options.prompt is not None:
            _answer_one(options, out, as_json=as_json)
        else:
            _answer_file(options, out, as_json=as_json)


def _read(typed: dict[str, Any]) -> GenerateOptions:
    """The options, if they belong together. Raises UsageError."""
    try:
        options = read_options(GenerateOptions, typed, "generate")
    except UsageError as error:
        raise UsageError(error.message, "See: calpaca generate --help") from error
    assert isinstance(options, GenerateOptions)
    if (options.prompt is None) == (options.data_file is None):
        raise UsageError("generate takes one instruction or a file of them.", "Give --prompt or --data-file.")
    if options.prompt is not None and (options.output or options.template or options.format != "jsonl"):
        raise UsageError("--output, --template and --format belong to a data file.", "Give --data-file.")
    if options.format == "seed" and options.output is None:
        raise UsageError("--format seed writes a file.", "Name it with --output predictions.json.")
    if options.output is not None and options.output.exists() and not options.overwrite:
        raise UsageError(f"{options.output} is there already.", "Name another file, or say --overwrite.")
    return options


def _model(options: GenerateOptions, runtime: Runtime) -> tuple[Model, bool]:
    """The model, and whether it answers an instruction in its chat template or continues its text."""
    from calpaca.core.template import no_template

    runtime.attaches = runtime.settings.attach
    if options.prompt is None:
        runtime.purpose = "load"
    model = runtime.model(options.spec())
    bare = model.template == no_template() and not model.engine.capabilities().conversations
    if bare and options.with_prompt is None:
        click.echo(f"Note: {model.name} brings no chat template; it continues each text as it stands.", err=True)
    return model, not bare if options.with_prompt is None else options.with_prompt


def _answer_one(options: GenerateOptions, out: TextIO, *, as_json: bool) -> None:
    """Print the answer to --prompt as it comes. Nothing is kept: to ask again is to sample again."""
    from calpaca.core.generation import Generation
    from calpaca.core.instructions import Instruction

    runtime = shared_runtime()
    sampling = options.sampling(runtime.settings)
    model, wrapped = _model(options, runtime)
    asked = Instruction(str(options.prompt), str(options.prompt))
    handle = Generation(model, [asked], sampling, wrapped=wrapped, system=options.system).submit(0, sampling)
    for chunk in handle:
        if not as_json:
            out.write(chunk.text)
            out.flush()
    answer = handle.result()
    out.write(_described(answer.text, answer.finish_reason, asdict(answer.usage)) if as_json else "\n")


def _described(text: str, finish_reason: str, usage: dict[str, Any]) -> str:
    return json.dumps({"answer": text, "finish_reason": finish_reason, "usage": usage}, ensure_ascii=False) + "\n"


def _answer_file(options: GenerateOptions, out: TextIO, *, as_json: bool) -> None:
    """Answer all instructions of --data-file into --output, or print them. Raises JobError where some failed."""
    from calpaca.core.generation import KIND, Generation

    instructions = _instructions(options)  # before the model is loaded: bad rows are told at once
    runtime = shared_runtime()
    sampling = options.sampling(runtime.settings)
    model, wrapped = _model(options, runtime)
    generation = Generation(
        model, instructions, sampling, wrapped=wrapped, system=options.system, in_flight=options.in_flight
    )
    started = monotonic()
    job = runtime.jobs.start(KIND, f"Answer {options.data_file}", _parameters(options))
    with _resumable(job), job, _target(options, sampling, out) as stream:
        answers = list(_written(generation, job, stream, options))
    summary = _summary(job, answers, monotonic() - started)
    if options.output is not None:
        out.write(json.dumps({"output": str(options.output), **summary}) if as_json else str(options.output))
        out.write("\n")
    click.echo(_told(summary), err=True)
    if summary["failed"]:
        raise JobError(
            f"{summary['failed']} of {summary['rows']} rows failed; `error` in their place says why.",
            "The same command with --overwrite tries those again and keeps the others.",
        )


def _instructions(options: GenerateOptions) -> list[Instruction]:
    from calpaca.core.encoding import decode
    from calpaca.core.instructions import read_instructions

    file = options.data_file
    assert file is not None
    try:
        data = sys.stdin.buffer.read() if file == _STDIN else file.expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.", "Check --data-file.") from error
    name = "stdin" if file == _STDIN else str(file)
    return read_instructions(decode(data, name)[0], name, options.template)


def _parameters(options: GenerateOptions) -> dict[str, Any]:
    """What `calpaca jobs resume` starts again: the command, unless its input came through a pipe."""
    piped = options.data_file == _STDIN
    argv = [] if piped else list(click.get_current_context().obj or ())
    return {"argv": argv, "cwd": str(Path.cwd()), "options": options.model_dump(mode="json", exclude_defaults=True)}


@contextmanager
def _resumable(job: Job) -> Iterator[None]:
    from calpaca.core.jobs import JobCancelled

    try:
        yield
    except KeyboardInterrupt:
        raise JobCancelled(
            "Cancelled; what is answered is kept.", f"Go on with: calpaca jobs resume {job.id}"
        ) from None


@contextmanager
def _target(options: GenerateOptions, sampling: Sampling, out: TextIO) -> Iterator[TextIO]:
    """Where the answers go: the output file, which appears when it is complete, or stdout."""
    from calpaca.core.paths import atomic_file
    from calpaca.core.predictions import generation_config

    if options.output is None:
        yield out
        return
    with atomic_file(options.output) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        yield stream
    if options.format == "seed":
        config = json.dumps(generation_config(sampling), indent=2) + "\n"
        options.output.with_name("generation_config.json").write_text(config, encoding="utf-8")


def _written(generation: Generation, job: Job, stream: TextIO, options: GenerateOptions) -> Iterator[Answer]:
    """Write the answers, under a bar where they do not themselves go to the screen."""
    from tqdm import tqdm

    from calpaca.core.predictions import write_predictions

    answers = write_predictions(generation, job, stream, options.format)
    hidden = not sys.stderr.isatty() or stream.isatty()
    yield from tqdm(
        answers, total=len(generation.instructions), unit=" row", file=sys.stderr, disable=hidden, leave=False,
        dynamic_ncols=True,
    )  # fmt: skip


def _summary(job: Job, answers: list[Answer], seconds: float) -> dict[str, Any]:
    return {
        "rows": len(answers),
        "failed": sum(answer.error is not None for answer in answers),
        "cut": sum(answer.finish_reason == "length" for answer in answers),
        "reused": job.reused,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "completion_tokens": sum(answer.completion_tokens for answer in answers),
        "seconds": round(seconds, 1),
        "job": job.id,
    }


def _told(summary: dict[str, Any]) -> str:
    cut = ", {cut} cut at their longest length (--max-new-tokens)" if summary["cut"] else ""
    return (
        f"{{rows}} rows, {{reused}} of them answered before{cut}; {{completion_tokens}} tokens, {{seconds}} s.".format(
            **summary
        )
    )


_JSON = click.Option(["_json", "--json"], is_flag=True, help="Print one JSON object.")

generate = AppCommand(
    "generate",
    params=[*(flag for flag in flags("generate", GenerateOptions) if flag.name != "embedding"), _JSON],
    callback=_generate,
    help="""Answer one instruction, or a file of them.

    The answers to a file keep its order, and what is wrong with a row stands in its place. A run that was killed goes on
    where it ended: give the same command again. Sampling is repeatable: left out, the seed of a file is 0.
    """,
    groups={name: group_of(GenerateOptions, name) for name in GenerateOptions.model_fields},
)
