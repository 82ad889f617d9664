"""A model as a GGUF file: planned, written tensor by tensor, read back and compared, with a Modelfile beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from calpaca.core.checkpoint.lineage import versions
from calpaca.core.checkpoint.manifest import Lineage
from calpaca.core.checkpoint.plan import ModelPlan, PlannedFile
from calpaca.core.convert.names import HF_EMBEDDINGS, HF_OUTPUT
from calpaca.core.export.check import ExportCheck, check_logits, check_tensors, check_vocabulary, template_of
from calpaca.core.export.gguf_architecture import GgufArchitecture, read_architecture
from calpaca.core.export.gguf_header import describe_model, describe_vocabulary, make_header
from calpaca.core.export.gguf_tensors import GgufTensor, gguf_tensors, widened
from calpaca.core.export.gguf_types import PlainType, plain_type
from calpaca.core.export.gguf_vocabulary import Vocabulary, read_vocabulary
from calpaca.core.export.modelfile import MODELFILE, modelfile
from calpaca.core.export.source import Source, read_source
from calpaca.core.files import ModelFiles
from calpaca.core.template import ChatTemplate
from calpaca.core.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class GgufOptions:
    """`type` is one of `gguf_types.PLAIN`; `pre` names llama.cpp's pre-tokenizer where it is not recognised.

    `logits` runs source and file on a few prompts, where they fit in memory.
    """

    type: str = "f16"
    pre: str | None = None
    logits: bool = True


@dataclass(frozen=True)
class GgufExport:
    """What will be written. `notes` are for a person."""

    file_name: str
    type: PlainType
    source: Source
    architecture: GgufArchitecture
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    template: ChatTemplate | None
    tensors: tuple[GgufTensor, ...]
    model: ModelPlan
    notes: tuple[str, ...]

    def check(self, file: Path, *, logits: bool = True) -> ExportCheck:
        """Read a written file back and compare it with the source. Raises ModelError with what differs."""
        count = check_tensors(file, self.tensors)
        texts = check_vocabulary(file, self.vocabulary, self.tokenizer, self.template)
        if not logits:
            return ExportCheck(count, texts, reason="logits were not compared")
        return ExportCheck(count, texts, **check_logits(file, self.source, self.architecture, self.type))


def plan_gguf(files: ModelFiles, options: GgufOptions | None = None) -> GgufExport:
    """Plan a GGUF file of a model, with its adapters merged into it. Reads headers, configuration and tokenizer.

    `model.check` is not set: whoever writes the plan decides how far the result is compared.
    Raises UnsupportedError for an architecture, type or tokenizer that cannot be written, CorruptFileError or ModelError
    for a model that is not whole.
    """
    options = options or GgufOptions()
    wanted = plain_type(options.type)
    source = read_source(files)
    architecture = read_architecture(source.config, source.name, tied=HF_OUTPUT not in source.tensors)
    tensors = gguf_tensors(source.tensors, architecture, wanted)
    tokenizer = load_tokenizer(source.tokenizer)
    vocabulary = read_vocabulary(source.tokenizer, tokenizer, source.tensors[HF_EMBEDDINGS].shape[0], options.pre)
    template = template_of(tokenizer, source)
    name = f"model-{wanted.name}.gguf"
    planned = tuple(tensor.planned() for tensor in tensors)

    def describe(writer: Any) -> None:
        describe_model(
            writer, architecture, wanted, name=source.name, licence=source.licence, parameters=source.parameters
        )
        describe_vocabulary(writer, vocabulary, template.source if template is not None else None)

    header = make_header(architecture.name, describe, planned)
    settings = {"format": "gguf", "type": wanted.name, "pre": vocabulary.pre}
    model = ModelPlan(
        (PlannedFile(name, "gguf", planned, header),),
        partial(_lineage, source, settings, template),
        source.paths,
        settings | {"header": hashlib.sha256(header).hexdigest()},
        {MODELFILE: modelfile(f"./{name}", template, add_bos=vocabulary.add_bos).encode()},
    )
    notes = (*source.notes, *architecture.notes, *vocabulary.notes, *_notes(tensors, wanted))
    return GgufExport(name, wanted, source, architecture, vocabulary, tokenizer, template, tuple(tensors), model, notes)


def _lineage(source: Source, settings: dict[str, Any], template: ChatTemplate | None) -> Lineage:
    digest = hashlib.sha256(template.source.encode()).hexdigest() if template is not None else None
    return Lineage("export", source.inputs(), settings, digest, versions())


def _notes(tensors: Sequence[GgufTensor], wanted: PlainType) -> list[str]:
    names = widened(list(tensors), wanted)
    if not names:
        return []
    return [
        f"{len(names)} tensors are stored as f16, since their rows do not divide into blocks of {wanted.block}: {names[0]} …"
    ]
