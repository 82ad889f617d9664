"""`calpaca models show`: what a model, an adapter or a file is, and how a model's chat template renders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.models.files import find
from calpaca.cli.run import shared_runtime
from calpaca.cli.table import size, table
from calpaca.core.errors import UsageError

if TYPE_CHECKING:
    from calpaca.core.adapter_card import AdapterCard
    from calpaca.core.checkpoint.manifest import Input, Lineage
    from calpaca.core.golden import GoldenRendering
    from calpaca.core.known_files import FileCard
    from calpaca.core.memory import MemoryNeed
    from calpaca.core.model_card import ModelCard

_NESTED = {"tokens", "template", "template_sha256", "base", "adapter", "lineage", "memory", "known", "advice"}
"""Fields of a card that do not stand on a line of their own."""


@click.command()
@click.argument("name", metavar="NAME|FILE")
@click.option("--template", "as_template", is_flag=True, help="Show the chat template and what it renders instead.")
@click.option("--chat-template", metavar="TEXT", help="With --template: a built-in template by name, or a Jinja file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(name: str, as_template: bool, chat_template: str | None, as_json: bool) -> None:
    """Describe a model, adapter or file. A model that is not here is fetched.

    Prints architecture, size, vocabulary, template, adapter, lineage, memory needed and fingerprint. A single file
    (.pth, .bin, .safetensors, tokenizer.model) is looked up in the published sums. No weights are loaded.
    """
    if as_template:
        _show_template(name, chat_template, as_json)
        return
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        _show_file(path, as_json)
        return
    card, adapters = _cards(name)
    if as_json:
        _print_json({**asdict(card), "adapters": [asdict(adapter) for adapter in adapters]})
        return
    click.echo("\n\n".join(_as_lines(_lines(each)) for each in (card, *adapters)))


def _cards(name: str) -> tuple[ModelCard, list[ModelCard]]:
    """The model, and the adapters that the settings put on it."""
    from calpaca.core.model_card import read_card
    from calpaca.core.sources import resolve_adapter

    runtime = shared_runtime()
    adapters = [resolve_adapter(adapter.source, runtime) for adapter in runtime.spec(name).adapters]
    return read_card(find(name, runtime, None)), [read_card(adapter) for adapter in adapters]


def _print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def _as_lines(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{field:<16}{text}" for field, text in pairs)


# ---- a model or adapter ------------------------------------------------------------------------------------------


def _lines(card: ModelCard) -> Iterator[tuple[str, str]]:
    for field in fields(card):
        value = getattr(card, field.name)
        if value is not None and field.name not in _NESTED:
            yield field.name.replace("_", " "), _shown(card, field.name, value)
    if card.template_sha256 is not None:
        yield "template", f"{card.template or 'its own'} (sha256 {card.template_sha256})"
    if card.adapter is not None:
        yield from _adapter_lines(card.adapter)
    for file, what in (card.known or {}).items():
        yield "known file", f"{file} is {what}"
    if card.lineage is not None:
        yield from (("lineage" * (not row), text) for row, text in enumerate(_lineage(card.lineage)))
    if card.memory:
        yield from (("memory" * (not row), text) for row, text in enumerate(_memory(card.memory)))
    if card.advice is not None:
        yield "next", card.advice


def _shown(card: ModelCard, field: str, value: Any) -> str:
    if field == "size":
        return size(value)
    if field == "vocabulary" and card.tokens not in {None, value}:
        return f"{value:,} embedding rows, {card.tokens:,} tokens"
    if field == "format" and value == "pth":
        return "original LLaMA (.pth)"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _adapter_lines(adapter: AdapterCard) -> Iterator[tuple[str, str]]:
    yield "adapter", f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha}"
    for name, pattern in (("ranks", adapter.ranks), ("alphas", adapter.alphas)):
        if pattern:
            yield name, ", ".join(f"{module} {value}" for module, value in pattern.items())
    yield "base", adapter.base or "not stated"
    yield "target modules", ", ".join(adapter.target_modules)
    if adapter.modules_to_save:
        yield "modules to save", ", ".join(adapter.modules_to_save)
    if adapter.rows is not None:
        yield "vocabulary", f"{adapter.rows:,} embedding rows"


def _lineage(lineage: Lineage) -> Iterator[str]:
    settings = ", ".join(f"{name} {value}" for name, value in lineage.settings.items() if value is not None)
    yield f"{lineage.operation}{f' ({settings})' if settings else ''} of"
    for each in lineage.inputs:
        yield from _origin(each, "  ")


def _origin(origin: Input, indent: str) -> Iterator[str]:
    scale = f", scale {origin.scale:g}" if origin.scale != 1 else ""
    yield f"{indent}{origin.role} {origin.name} ({origin.fingerprint[:12]}{scale})"
    for each in origin.made_of:
        yield from _origin(each, f"{indent}  ")


def _memory(needs: tuple[MemoryNeed, ...]) -> Iterator[str]:
    rows = [(need.dtype, size(need.weights), size(need.cache or 0)) for need in needs]
    yield from table(("DTYPE", "WEIGHTS", "KEYS AND VALUES OF ONE FULL CONTEXT"), rows).splitlines()


# ---- a file ------------------------------------------------------------------------------------------------------


def _show_file(path: Path, as_json: bool) -> None:
    from calpaca.core.known_files import read_file_card

    card = read_file_card(path)
    if as_json:
        _print_json({**asdict(card), "remark": card.remark})
        return
    click.echo(_as_lines(_file_lines(card)))


def _file_lines(card: FileCard) -> Iterator[tuple[str, str]]:
    yield "path", str(card.path)
    yield "size", f"{card.size:,} bytes"
    yield "sha256", card.sha256
    for field in ("tensors", "parameters", "dtype", "tokens"):
        value = getattr(card, field)
        if value is not None:
            yield field, f"{value:,}" if isinstance(value, int) else value
    yield "what it is", card.known or card.remark or ""


# ---- a chat template ---------------------------------------------------------------------------------------------


def _show_template(name: str, chat_template: str | None, as_json: bool) -> None:
    from calpaca.core.files import find_files
    from calpaca.core.golden import render_golden
    from calpaca.core.template import NAMED_TEMPLATES, choose_template, template_digest, template_name
    from calpaca.core.tokenizer import load_tokenizer

    runtime = shared_runtime()
    spec = runtime.spec(name)
    files = find_files(spec.model_copy(update={"chat_template": chat_template or spec.chat_template}), runtime)
    tokenizer = load_tokenizer(files.tokenizer)
    if files.template is None and not tokenizer.chat_template:
        known = ", ".join(NAMED_TEMPLATES)
        raise UsageError(f"{files.name} brings no chat template.", f"Name one with --chat-template: {known}.")
    template = choose_template(tokenizer, files.template)
    renderings = render_golden(template, tokenizer)
    header = {"template": template_name(template.source), "template_sha256": template_digest(template.source)}
    if as_json:
        _print_json({**header, "source": template.source, "conversations": [asdict(each) for each in renderings]})
        return
    click.echo(f"template        {header['template'] or 'its own'} (sha256 {header['template_sha256']})")
    for rendering in renderings:
        click.echo(_rendering(rendering))


def _rendering(rendering: GoldenRendering) -> str:
    title = f"\n== {rendering.name}"
    if rendering.error is not None:
        return f"{title}: {rendering.error}"
    return f"{title}, {len(rendering.token_ids)} tokens\n{rendering.text}\n{' '.join(map(str, rendering.token_ids))}"
