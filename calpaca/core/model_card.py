"""What a model on disk is: architecture, size, vocabulary, template, adapters, lineage, memory needed, fingerprint.

Read from headers and configuration files alone: no weights are loaded, and no torch is needed but for `.bin` and `.pth`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calpaca.core.adapter_card import AdapterCard, read_adapter_card
from calpaca.core.catalogue import ENTRIES
from calpaca.core.checkpoint.manifest import Lineage, read_manifest
from calpaca.core.errors import CorruptFileError
from calpaca.core.fingerprint import file_digest, fingerprint, model_files
from calpaca.core.known_files import identify
from calpaca.core.memory import EMBEDDINGS, MemoryNeed, memory_needs
from calpaca.core.model_facts import ModelFacts, read_facts, read_json
from calpaca.core.sources import Found
from calpaca.core.template import template_digest, template_name
from calpaca.core.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ModelCard:
    """None where the files do not say. `size` is bytes on disk, `context_length` tokens, `base` an adapter's base.

    `vocabulary` counts embedding rows, `tokens` those of the tokenizer. `template` is the name of a built-in one,
    `template_sha256` the digest of any. `known` says of files by name what they are by published sums.
    """

    name: str
    path: Path
    source: str
    format: str
    size: int
    fingerprint: str
    architecture: str | None = None
    parameters: int | None = None
    vocabulary: int | None = None
    tokens: int | None = None
    context_length: int | None = None
    dtype: str | None = None
    template: str | None = None
    template_sha256: str | None = None
    licence: str | None = None
    base: str | None = None
    adapter: AdapterCard | None = None
    lineage: Lineage | None = None
    memory: tuple[MemoryNeed, ...] = ()
    known: Mapping[str, str] | None = None
    advice: str | None = None


def read_card(found: Found) -> ModelCard:
    """Describe a model folder, an adapter folder, an original LLaMA folder or a GGUF file.

    Raises CorruptFileError or ModelNotFoundError.
    """
    path = found.path
    facts = read_facts(path)
    files = model_files(path) if path.is_dir() else [path]
    manifest = read_manifest(path) if path.is_dir() else None
    is_adapter = facts.format == "adapter"
    names = facts.config.get("architectures") or [facts.adapter.get("peft_type")]
    return ModelCard(
        name=found.name,
        path=path,
        source=found.source,
        format=facts.format,
        size=sum(file.stat().st_size for file in files),
        fingerprint=fingerprint(path),
        architecture=names[0],
        parameters=facts.elements.total() or None,
        vocabulary=_rows(facts) or facts.config.get("vocab_size"),
        tokens=_tokens(path, facts),
        context_length=facts.config.get("max_position_embeddings"),
        dtype=facts.dtype,
        template=template_name(facts.template) if facts.template is not None else None,
        template_sha256=template_digest(facts.template) if facts.template is not None else None,
        licence=_catalogue_licence(found) or facts.licence,
        base=facts.adapter.get("base_model_name_or_path"),
        adapter=read_adapter_card(path, facts.adapter) if facts.adapter else None,
        lineage=manifest.lineage if manifest is not None else None,
        memory=memory_needs(facts.shapes, facts.config) if facts.shapes and not is_adapter else (),
        known=_known(files),
        advice=f"Convert it: calpaca models convert {path} --output DIR" if facts.format == "pth" else None,
    )


def _rows(facts: ModelFacts) -> int | None:
    """Rows of the input embeddings."""
    return next((shape[0] for name, shape in facts.shapes.items() if name.endswith(EMBEDDINGS)), None)


def _known(files: list[Path]) -> dict[str, str] | None:
    named = {file.name: identify(file_digest(file)) for file in files}
    return {name: what for name, what in named.items() if what is not None} or None


def _tokens(path: Path, facts: ModelFacts) -> int | None:
    """Tokens of the tokenizer that lies in a folder or GGUF file: the largest id plus one."""
    if path.is_file():
        return facts.config.get("vocab_size")
    if (path / "tokenizer.json").is_file() and not (path / "tokenizer.model").is_file():
        return _tokens_of_json(path / "tokenizer.json")
    try:
        return len(load_tokenizer(path)) if (path / "tokenizer.model").is_file() else None
    except ModuleNotFoundError:  # SentencePiece is not installed
        return None


def _tokens_of_json(file: Path) -> int:
    """Its vocabulary is an object (BPE, WordPiece) or a list in the order of the ids (Unigram)."""
    content = read_json(file)
    try:
        vocabulary = content["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, Mapping) else range(len(vocabulary))
        added = [token["id"] for token in content.get("added_tokens", ())]
        return max((*ids, *added), default=-1) + 1
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{file} is no tokenizer: {error}.", "Fetch the file again.") from error


def _catalogue_licence(found: Found) -> str | None:
    entry = ENTRIES.get(found.name)
    return entry.licence if entry is not None and found.source != "local" else None
