"""`calpaca vocab`: vocabularies trained, merged and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.group import Group
from calpaca.cli.models.command import current_command
from calpaca.cli.run import shared_runtime
from calpaca.cli.table import table

if TYPE_CHECKING:
    from calpaca_trainer.vocabulary_model import Extension

_FILTERS = ("digits", "html", "non-cjk", "space")
_PATH = click.Path(path_type=Path)


@click.group(cls=Group)
def vocab() -> None:
    """Trains SentencePiece vocabularies, merges them into a LLaMA-style one, and measures them."""


@vocab.command()
@click.argument("corpus", nargs=-1, required=True, type=_PATH)
@click.option("--output", "-o", required=True, type=_PATH, help="The .model file to write.")
@click.option("--vocab-size", "size", type=click.IntRange(10), default=20_000, show_default=True, help="Pieces.")
@click.option(
    "--type", "kind", type=click.Choice(["unigram", "bpe"]), default="unigram", show_default=True,
    help="How SentencePiece chooses the pieces.",
)  # fmt: skip
@click.option(
    "--coverage", type=click.FloatRange(0.98, 1), default=0.9995, show_default=True,
    help="Share of the text's characters that get a piece.",
)  # fmt: skip
@click.option(
    "--sentences", type=click.IntRange(1), default=2_000_000, show_default=True,
    help="Lines that are kept in memory, drawn at random from all.",
)  # fmt: skip
@click.option("--byte-fallback", is_flag=True, help="Write characters without a piece as bytes.")
@click.option(
    "--normalization", type=click.Choice(["nmt_nfkc", "nfkc", "identity"]), default="nmt_nfkc", show_default=True,
    help="What is done to a text first.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads that SentencePiece trains with."
)
def train(corpus: tuple[Path, ...], output: Path, **options: Any) -> None:
    """Train a vocabulary on text files, or on the .txt and .md files of folders, read line by line."""
    from calpaca.core.errors import UsageError
    from calpaca_trainer.vocabulary_training import VocabularyOptions, train_vocabulary

    if output.exists():
        raise UsageError(f"{output} exists already.", "Name another --output, or remove it first.")
    data = train_vocabulary(corpus, VocabularyOptions(**options))
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished")
    unfinished.write_bytes(data)
    unfinished.replace(output)
    click.echo(output)


@vocab.command()
@click.argument("base", type=_PATH)
@click.argument("added", type=_PATH)
@click.option("--output", "-o", required=True, type=_PATH, help="The folder to write.")
@click.option(
    "--drop", "filters", multiple=True, type=click.Choice(_FILTERS),
    help="Leave out digit strings, remains of web pages, pieces without an ideograph, or pieces that begin with a"
    " space; repeat for several. Default: none, as Chinese-LLaMA's script did.",
)  # fmt: skip
@click.option("--add-token", "tokens", multiple=True, metavar="TEXT", help="One more piece at the end, such as [PAD].")
@click.option("--model", type=_PATH, help="Write this model too, with rows for the new tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(
    base: Path, added: Path, *, output: Path, filters: tuple[str, ...], tokens: tuple[str, ...], model: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Put the pieces of the vocabulary ADDED behind those of BASE that it lacks, and print the folder that was written.

    BASE and ADDED are SentencePiece models, or folders with a tokenizer.model. The folder gets tokenizer.model and the
    files that Hugging Face needs; with --model the whole model, whose new rows are the means of those of the pieces that
    stood for the new ones so far.
    """
    from calpaca.core.checkpoint.write import check_output
    from calpaca_trainer.vocabulary import merge_vocabularies, read_pieces
    from calpaca_trainer.vocabulary_model import Extension

    check_output(output)
    pieces = read_pieces(base)
    new = (piece.piece for piece in read_pieces(added).pieces)
    extension = Extension(pieces, merge_vocabularies(pieces, new, filters=filters, tokens=tokens), filters)
    _write(extension, model, output)
    facts = _facts(extension)
    if as_json:
        click.echo(json.dumps({"output": str(output), **facts}, ensure_ascii=False, indent=2))
        return
    for line in _told(facts):
        click.echo(line, err=True)
    click.echo(output)


def _write(extension: Extension, model: Path | None, output: Path) -> None:
    from calpaca.core.checkpoint.write import write_model
    from calpaca_trainer.vocabulary_model import plan_extension, tokenizer_files

    if model is not None:
        write_model(plan_extension(model, extension, str(model)), output, shared_runtime().jobs, current_command())
        return
    texts = tokenizer_files(extension).texts
    unfinished = output.absolute().parent / f".{output.name}.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (unfinished / name).write_bytes(content)
    unfinished.replace(output)


def _facts(extension: Extension) -> dict[str, Any]:
    merged = extension.merged
    return {
        "before": len(extension.base.pieces),
        "after": extension.size,
        "added": len(merged.added),
        "known": merged.known,
        "left_out": dict(merged.left_out),
        "among_the_added": merged.traits(),
    }


def _told(facts: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{facts['before']:,} pieces become {facts['after']:,}: {facts['added']:,} are new, {facts['known']:,} were there."
    ]
    lines += [f"{count:,} were left out ({name})." for name, count in facts["left_out"].items()]
    found = [f"{count:,} {name}" for name, count in facts["among_the_added"].items() if count]
    return [*lines, f"Among the new ones: {', '.join(found)} (--drop leaves them out)."] if found else lines


@vocab.command()
@click.argument("models", nargs=-1, required=True, type=_PATH)
@click.option(
    "--text", "texts", multiple=True, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A text to measure on; repeat for several.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def report(models: tuple[Path, ...], texts: tuple[Path, ...], as_json: bool) -> None:
    """Tokens per character that vocabularies need for texts, and whether the texts come back exactly."""
    from calpaca_trainer.vocabulary_report import measure

    found = measure(models, texts)
    if as_json:
        rows = [{**asdict(each), "tokens_per_character": each.tokens_per_character} for each in found]
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    click.echo(
        table(
            ("VOCABULARY", "PIECES", "TEXT", "CHARACTERS", "TOKENS", "PER CHARACTER", "ROUND TRIP"),
            [
                (
                    each.vocabulary, f"{each.pieces:,}", each.text, f"{each.characters:,}", f"{each.tokens:,}",
                    f"{each.tokens_per_character:.3f}",
                    "exact" if each.difference is None else f"differs at character {each.difference}",
                )
                for each in found
            ],
        )
    )  # fmt: skip
