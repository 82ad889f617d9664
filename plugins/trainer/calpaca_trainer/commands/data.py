"""`calpaca train data`: what training data becomes, before anything is trained on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.group import Group
from calpaca.cli.run import AppCommand, shared_runtime, was_typed
from calpaca_trainer.commands.options import groups, recipe_flags
from calpaca_trainer.recipe import CheckOptions, Recipe, read_recipe

if TYPE_CHECKING:
    from calpaca_trainer.dataset import Dataset
    from calpaca_trainer.preference_data import PreferenceLoss
    from calpaca_trainer.prompting import Prompting
    from calpaca_trainer.rows import Fault

_PERCENTILES = (0, 50, 90, 99, 100)


@click.group(cls=Group)
def data() -> None:
    """Check training data."""


@click.pass_context
def _check(ctx: click.Context, /, stage: Any, example: int, as_json: bool, **values: Any) -> None:
    from calpaca_trainer.dataset import load_dataset
    from calpaca_trainer.training import load_subject

    typed = {name: value for name, value in values.items() if was_typed(ctx, name)}
    recipe = read_recipe(None, typed, "train data check")
    _, prompting = load_subject(recipe, shared_runtime())
    if stage in {"dpo", "kto"}:
        _check_preferences(recipe, prompting, stage, example, as_json=as_json)
        return
    dataset = load_dataset(recipe.sources, prompting.rendering(recipe, stage))
    if as_json:
        click.echo(json.dumps(_facts(dataset), ensure_ascii=False, indent=2))
    else:
        for line in _lines(dataset, prompting, min(example, len(dataset)) - 1):
            click.echo(line)
    if dataset.faults:
        raise SystemExit(1)


def _check_preferences(
    recipe: Recipe, prompting: Prompting, loss: PreferenceLoss, example: int, *, as_json: bool
) -> None:
    from calpaca_trainer.preference_data import load_preferences

    data = load_preferences(recipe.sources, prompting.answers(recipe), loss)
    facts = {
        "examples": len(data),
        "tokens": int(data.lengths.sum()),
        "longest": int(data.lengths.max()),
        "faults": _listed(data.faults),
    }
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        number = min(example, len(data)) - 1
        click.echo(f"{facts['examples']} examples, {facts['tokens']:,} tokens, the longest {facts['longest']}")
        click.echo(f"\nExample {number + 1}, from {data.place(number)}:")
        for mark, ids in data.rows[number].parts():
            click.echo(f"{mark} {prompting.tokenizer.decode(ids)!r}")
        for line in _told(data.faults):
            click.echo(line)
    if data.faults:
        raise SystemExit(1)


def _listed(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    return [{"file": str(each.file), "line": each.line, "reason": each.reason} for each in faults]


def _told(faults: Sequence[Fault]) -> Iterator[str]:
    if faults:
        yield f"\n{len(faults)} rows cannot be used:"
        yield from map(str, faults)


def _facts(dataset: Dataset) -> dict[str, Any]:
    """Counts of everything, and all faults."""
    import numpy as np

    lengths = dataset.lengths
    return {
        "files": [
            {"file": str(cache.file), "form": cache.facts["form"], "rows": cache.facts["rows"], "examples": len(cache)}
            for cache in dataset.caches
        ],
        "examples": len(dataset),
        "tokens": int(lengths.sum()),
        "learnt_tokens": int(dataset.learnt.sum()),
        "lengths": {str(each): int(np.percentile(lengths, each)) for each in _PERCENTILES},
        "faults": _listed(dataset.faults),
    }


def _lines(dataset: Dataset, prompting: Prompting, number: int) -> Iterator[str]:
    facts = _facts(dataset)
    for file in facts["files"]:
        yield f"{file['file']}: {file['rows']} rows of {file['form']}, {file['examples']} examples"
    yield f"tokens   {facts['tokens']:,}, of which {facts['learnt_tokens']:,} are learnt"
    lengths = facts["lengths"]
    yield f"lengths  shortest {lengths['0']}, median {lengths['50']}, 99 % up to {lengths['99']}, longest {lengths['100']}"
    yield f"\nExample {number + 1}, from {dataset.place(number)}; what is learnt is marked with +:"
    yield from _shown(dataset[number], prompting)
    yield from _told(dataset.faults)


def _shown(example: dict[str, Any], prompting: Prompting) -> Iterator[str]:
    """One line for each token: its mark, its id and its text."""
    texts = {prompting.tokenizer.token_id(text): text for text in prompting.tokenizer.control_tokens}
    for number, (index, learnt) in enumerate(zip(example["ids"].tolist(), example["marks"].tolist(), strict=True)):
        text = texts.get(index) or prompting.tokenizer.decode([index])
        yield f"{'+' if learnt and number else ' '} {index:>6} {text!r}"


data.add_command(
    AppCommand(
        "check",
        params=[
            click.Option(
                ["--stage"],
                type=click.Choice(["sft", "pretrain", "dpo", "kto"]),
                default="sft",
                help="What it is read for.",
            ),
            click.Option(["--example"], type=click.IntRange(min=1), default=1, help="Which example to show."),
            click.Option(["as_json", "--json"], is_flag=True, help="Print one JSON object."),
            *recipe_flags("train data check", CheckOptions),
        ],
        callback=_check,
        help="""Reads training data, lists every row that cannot be used, and shows what the others become.

        Prints counts, lengths, and one example token by token, with a mark on what is learnt. The exit code is 1 when a
        row cannot be used. The tokens are kept for training.
        """,
        groups=groups(CheckOptions),
    )
)
