"""`calpaca models pull` and `path`: fetching models, and where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from calpaca.cli.run import shared_runtime
from calpaca.core.errors import UnsupportedError

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime
    from calpaca.core.sources import Found


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def pull(names: tuple[str, ...]) -> None:
    """Fetch models, going on with what was begun; print where each lies."""
    runtime = shared_runtime()
    for name in names:
        click.echo(find(name, runtime, None).path)


@click.command()
@click.argument("name")
@click.option(
    "--format", "file_format", type=click.Choice(["hf", "gguf"]), default="hf", show_default=True,
    help="The Hugging Face folder (a GGUF file is dequantized once), or the GGUF file.",
)  # fmt: skip
def path(name: str, file_format: Literal["hf", "gguf"]) -> None:
    """Print where a model lies, fetching it where needed."""
    click.echo(find(name, shared_runtime(), file_format).path)


def find(name: str, runtime: Runtime, file_format: Literal["hf", "gguf"] | None) -> Found:
    """The model, embedding model or reranker of this name, fetched where needed."""
    from calpaca.core.catalogue import ENTRIES
    from calpaca.core.sources import resolve_embedding, resolve_model, resolve_reranker

    spec = runtime.spec(name)
    entry = ENTRIES.get((spec.model or "").lower())
    if entry is None or entry.kind == "chat":
        return resolve_model(spec.model, runtime, revision=spec.revision, format=file_format)
    if file_format == "gguf":
        raise UnsupportedError(f"{entry.name} is no chat model and has no GGUF file.", "Leave out --format.")
    return (resolve_embedding if entry.kind == "embedding" else resolve_reranker)(entry.name, runtime)
