"""`calpaca train sft`, `calpaca train pretrain` and `calpaca train dpo`."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.run import AppCommand, shared_runtime, was_typed
from calpaca.core.errors import UsageError
from calpaca_trainer.commands.options import groups, recipe_flags
from calpaca_trainer.launch import launch, must_launch
from calpaca_trainer.recipe import PreferenceRecipe, Recipe, read_recipe

if TYPE_CHECKING:
    from calpaca_trainer.dataset import Stage
    from calpaca_trainer.training import Preparation

_OWN = {"recipe", "output", "estimate", "as_json"}


def _command(stage: Stage, help: str, kind: type[Recipe] = Recipe) -> click.Command:
    @click.pass_context
    def callback(ctx: click.Context, /, **values: Any) -> int:
        typed = {name: value for name, value in values.items() if name not in _OWN and was_typed(ctx, name)}
        recipe = read_recipe(values["recipe"], typed, f"train {stage}", kind)
        if must_launch(recipe.processes):
            return launch(tuple(ctx.obj or ()), recipe.processes or 1)
        _run(stage, recipe, values["output"], estimate=values["estimate"], as_json=values["as_json"])
        return 0

    return AppCommand(
        stage,
        params=[
            click.Argument(["recipe"], required=False, type=click.Path(path_type=Path)),
            click.Option(["--output", "-o"], type=click.Path(path_type=Path), help="Folder of the run."),
            click.Option(["--estimate"], is_flag=True, help="Check everything, print the memory it takes, and stop."),
            click.Option(["as_json", "--json"], is_flag=True, help="Print one JSON object."),
            *recipe_flags(f"train {stage}", kind),
        ],
        callback=callback,
        help=help,
        groups=groups(kind),
    )


def _run(stage: Stage, recipe: Recipe, output: Path | None, *, estimate: bool, as_json: bool) -> None:
    from calpaca_trainer.training import prepare, train

    runtime = shared_runtime()
    if output is None and not estimate:
        raise UsageError("It is not said where to write.", "Add --output DIR, or --estimate to see what it would take.")
    preparation = prepare(recipe, stage, runtime)
    if preparation.processes.is_first:
        _show_plan(preparation, err=not estimate or as_json)
    if output is None or estimate:
        if as_json:
            total = preparation.estimate.total(checkpointing=preparation.checkpointing)
            click.echo(
                json.dumps({"memory": total, "checkpointing": preparation.checkpointing, "steps": preparation.steps})
            )
        return
    argv = (*(click.get_current_context().obj or ()), *_processes_of_torchrun(preparation))
    with redirect_stdout(sys.stderr):  # DeepSpeed tells there what it has compiled
        summary = train(preparation, output, runtime, {"argv": argv, "cwd": str(Path.cwd())})
    if not preparation.processes.is_first:
        return
    click.echo(json.dumps({"output": str(output), **summary}, ensure_ascii=False, indent=2) if as_json else output)


def _processes_of_torchrun(preparation: Preparation) -> tuple[str, ...]:
    """What `calpaca jobs resume` needs to start as many processes as torchrun did."""
    it = preparation
    return ("--processes", str(it.processes.count)) if it.processes.count > 1 and not it.recipe.processes else ()


def _show_plan(preparation: Preparation, *, err: bool) -> None:
    it = preparation
    rows = [
        ("examples", f"{len(it.members)} to train on, {len(it.kept)} to measure on, {len(it.dataset.faults)} left out"),
        ("steps", f"{it.steps} of {it.recipe.batch_size * it.step_batches} rows"),
        ("checkpointing", "on: activations are computed twice" if it.checkpointing else "off"),
        *it.estimate.rows(checkpointing=it.checkpointing),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}", err=err)


sft = _command(
    "sft",
    """Fine-tunes a model on conversations and instructions.

    RECIPE is a TOML or YAML file of the options below, with underscores; a flag goes before it. Rows may be Alpaca's,
    ShareGPT's, OpenAI's messages, or prompts and completions, in JSON, JSONL, CSV or Parquet. Only the assistant's answers
    are learnt. The folder --output is an adapter, or with --method full a model, as it is. A run that was interrupted goes
    on when the same command is given again.
    """,
)
pretrain = _command(
    "pretrain",
    """Goes on with a model's pre-training, on plain texts.

    Texts are .txt files, or the column `text` of JSON, JSONL, CSV or Parquet. Each ends with the token that ends a text,
    and all of it is learnt. --packing puts several in a row. Otherwise as `calpaca train sft`.
    """,
)
dpo = _command(
    "dpo",
    """Learns from preferred answers.

    With --loss dpo rows have a prompt, a chosen and a rejected answer; with --loss kto a prompt, a completion and a label,
    true for a good one. The model learns to prefer the better answers, and stays near what it was: the adapter's beginning is
    the reference. Needs TRL: pip install 'calpaca-trainer[preferences]'. Otherwise as `calpaca train sft`.
    """,
    PreferenceRecipe,
)
