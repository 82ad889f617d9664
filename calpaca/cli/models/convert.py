"""`calpaca models convert`: a model in another form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.models.command import current_command
from calpaca.cli.run import shared_runtime
from calpaca.cli.size import SIZE
from calpaca.cli.table import size, table
from calpaca.core.errors import UsageError

if TYPE_CHECKING:
    from calpaca.core.checkpoint.manifest import Manifest
    from calpaca.core.checkpoint.plan import Container
    from calpaca.core.convert.conversion import Conversion, Form

_CONTAINERS: dict[str | None, Container | None] = {"safetensors": "safetensors", "bin": "torch", None: None}


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The folder to write. Needed but for --dry-run.")
@click.option(
    "--to", "form", type=click.Choice(["hf", "pth"]),
    help="Hugging Face's form, or that of original LLaMA. Default: hf, or pth where --parts is given.",
)  # fmt: skip
@click.option("--parts", type=click.IntRange(1), help="Number of consolidated.NN.pth files.  [default: 1]")
@click.option(
    "--format", "container", type=click.Choice(["safetensors", "bin"]), help="Files of --to hf.  [default: safetensors]"
)
@click.option("--shard-size", type=SIZE, help="Largest file of --to hf.  [default: 5GB]")
@click.option("--dtype", help="float32, bfloat16 or float16.  [default: as it is]")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="A tokenizer.model, or its folder.")
@click.option("--context-length", type=click.IntRange(1), help="Tokens, where an original checkpoint does not say.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(
    source: str, *, output: Path | None, form: Form | None, container: str | None, shard_size: int | None,
    parts: int | None, dtype: str | None, context_length: int | None, tokenizer: Path | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Convert a model between the original LLaMA form (consolidated.NN.pth) and Hugging Face's, exactly.

    SOURCE is a folder of either form, a .gguf file, a name of `calpaca models list` or a hub id. Nothing is held in
    memory but a few pieces of one tensor. Prints the folder that was written.
    """
    from calpaca.core.convert.conversion import Target, plan_conversion

    target = Target(form, _CONTAINERS[container], shard_size, parts, dtype, context_length, tokenizer)
    conversion = plan_conversion(_find(source), target)
    click.echo(f"{conversion.source}.", err=True)
    for note in conversion.notes:
        click.echo(note, err=True)
    manifest = None if dry_run else _write(conversion, output)
    if as_json:
        click.echo(json.dumps(_described(conversion, output, manifest), ensure_ascii=False, indent=2))
    elif conversion.plan is None:
        click.echo("It is in that form already; nothing was written.", err=True)
        click.echo(conversion.source.path)
    elif manifest is None:
        click.echo(_planned(conversion))
    else:
        click.echo(output)


def _find(source: str) -> Path:
    """A path as it is, anything else as `--model` takes it."""
    from calpaca.core.sources import resolve_model

    return path if (path := Path(source).expanduser()).exists() else resolve_model(source, shared_runtime()).path


def _write(conversion: Conversion, output: Path | None) -> Manifest | None:
    from calpaca.core.checkpoint.write import write_model

    if conversion.plan is None:
        return None
    if output is None:
        raise UsageError("It is not said where to write.", "Add --output DIR, or --dry-run to see what it would be.")
    return write_model(conversion.plan, output, shared_runtime().jobs, current_command())


def _planned(conversion: Conversion) -> str:
    """The files that would be written, and what that takes."""
    assert conversion.plan is not None
    rows = [(file.name, size(file.size), str(len(file.tensors))) for file in conversion.plan.files]
    rows += [(name, "-", "-") for name in sorted(conversion.plan.texts)]
    total = f"{conversion.target}: {conversion.plan.size:,} bytes of weights in all."
    return f"{table(('FILE', 'SIZE', 'TENSORS'), rows)}\n\n{total[0].upper()}{total[1:]}"


def _described(conversion: Conversion, output: Path | None, manifest: Manifest | None) -> dict[str, Any]:
    plan = conversion.plan
    return {
        "source": str(conversion.source.path),
        "kind": conversion.source.kind,
        "target": conversion.target.to,
        "output": str(output) if manifest is not None else None,
        "notes": list(conversion.notes),
        "files": [{"name": file.name, "size": file.size, "tensors": len(file.tensors)} for file in plan.files]
        if plan
        else [],
        "size": plan.size if plan else 0,
        "weights": manifest.weights if manifest is not None else None,
    }
