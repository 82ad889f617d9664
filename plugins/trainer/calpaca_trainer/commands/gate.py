"""`calpaca train gate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.flags import flags, group_of
from calpaca.cli.run import AppCommand, shared_runtime, was_typed
from calpaca.cli.table import table
from calpaca.core.errors import UsageError
from calpaca_trainer.gate import GateOptions

if TYPE_CHECKING:
    from calpaca_trainer.gate import Gate, Verdict

_COMMAND = "train gate"


@click.pass_context
def _gate(ctx: click.Context, /, output: Path | None, as_json: bool, **values: Any) -> None:
    from calpaca.plugins.options import read_options
    from calpaca_trainer.gate import judge, prepare_gate
    from calpaca_trainer.named_model import check_name, register, settings_file

    options = read_options(GateOptions, {name: each for name, each in values.items() if was_typed(ctx, name)}, _COMMAND)
    assert isinstance(options, GateOptions)
    if output is not None and output.exists():
        raise UsageError(f"{output} exists already.", "Name another --output.")
    file = settings_file()
    if options.name is not None:
        check_name(options.name, file)
    runtime = shared_runtime()
    gate = prepare_gate(options, runtime)
    _tell(gate)
    argv = tuple(ctx.find_root().obj or ())
    with runtime.jobs.start("gate", f"gate {options.adapters[-1]}", {"argv": argv, "cwd": str(Path.cwd())}) as job:
        verdict = judge(gate, runtime, job)
    if output is not None:
        _write(gate, verdict, output)
    registered = options.name if verdict.wins else None
    if registered is not None:
        register(registered, _named(gate), file)
    _show(gate, verdict, registered, file, as_json=as_json)
    if not verdict.wins:
        raise SystemExit(1)


def _tell(gate: Gate) -> None:
    for leak in gate.leaks:
        click.echo(f"left out, trained on: {leak}", err=True)
    for fault in gate.faults:
        click.echo(f"left out: {fault}", err=True)


def _named(gate: Gate) -> Any:
    """What is written into the settings: engine and device only where they were typed."""
    typed = gate.options.spec()
    return gate.adapted.model_copy(update={"engine": typed.engine, "device": typed.device})


def _write(gate: Gate, verdict: Verdict, output: Path) -> None:
    """A JSON line for each question: what each answered, and its score."""
    from calpaca.core.paths import atomic_file

    lines = []
    for number, question in enumerate(gate.questions):
        said = {each.name: {"answer": each.texts[number], "score": each.scores[number]} for each in verdict.answered}
        row = {"place": question.place, "question": question.question, "wanted": question.wanted, **said}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    with atomic_file(output) as part:
        part.write_text("".join(lines), "utf-8")


def _show(gate: Gate, verdict: Verdict, registered: str | None, file: Path, *, as_json: bool) -> None:
    if as_json:
        facts = {
            "adapter": gate.options.adapters[-1], "measure": gate.options.measure, "questions": len(gate.questions),
            "trained_on": len(gate.leaks), "registered": registered, **verdict.to_dict(),
        }  # fmt: skip
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    rows = [
        (name, f"{test.rival:.3f}", f"{test.candidate:.3f}", f"{test.difference:+.3f}",
         f"{test.low:+.3f} to {test.high:+.3f}", f"{test.won}:{test.lost}", f"{test.p:.4f}", test.test)
        for name, test in verdict.tests.items()
    ]  # fmt: skip
    click.echo(table(("AGAINST", "ITS", "ADAPTER'S", "DIFFERENCE", "95 % INTERVAL", "WON:LOST", "P", "TEST"), rows))
    click.echo(_said(gate, verdict, registered, file))


def _said(gate: Gate, verdict: Verdict, registered: str | None, file: Path) -> str:
    if not verdict.wins:
        return f"The adapter does not win on {len(gate.questions)} questions: nothing is registered."
    if registered is None:
        return f"The adapter wins on {len(gate.questions)} questions; --name would register it."
    return f"The adapter wins on {len(gate.questions)} questions: --model {registered} is in {file}."


gate = AppCommand(
    "gate",
    params=[
        *flags(_COMMAND, GateOptions),
        click.Option(["--output", "-o"], type=click.Path(path_type=Path), help="JSONL of all answers and scores."),
        click.Option(["as_json", "--json"], is_flag=True, help="Print one JSON object."),
    ],
    callback=_gate,
    help="""Compares a model with and without an adapter on held-out questions.

    The last --adapter is judged; with --app it must beat that app too, which runs the base model. Questions that were
    trained on, word for word or nearly, are left out. If the adapter wins against each of them, by a paired test and by the
    interval of the difference, --name registers it as a model in the settings: calpaca.toml in this folder, or the user's.
    The exit code is 0 when it wins and 1 when it does not, or when that cannot be told.
    """,
    groups={name: group_of(GateOptions, name) for name in GateOptions.model_fields},
)
