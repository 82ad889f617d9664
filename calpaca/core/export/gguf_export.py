"""A model as a GGUF file: planned, written tensor by tensor, read back and compared, with a Modelfile beside it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from calpaca.core.checkpoint.lineage import versions
from calpaca.core.checkpoint.manifest import Lineage, Manifest
from calpaca.core.checkpoint.plan import ModelPlan, PlannedFile
from calpaca.core.checkpoint.write import Command, check_output, write_model
from calpaca.core.convert.names import HF_EMBEDDINGS, HF_OUTPUT
from calpaca.core.export.check import (
    ExportCheck,
    check_logits,
    check_shapes,
    check_tensors,
    check_vocabulary,
    template_of,
)
from calpaca.core.export.gguf_architecture import GgufArchitecture, read_architecture
from calpaca.core.export.gguf_header import describe_model, describe_vocabulary, make_header
from calpaca.core.export.gguf_tensors import GgufTensor, gguf_tensors, widened
from calpaca.core.export.gguf_types import K_QUANTS, PlainType, plain_type
from calpaca.core.export.gguf_vocabulary import Vocabulary, read_vocabulary
from calpaca.core.export.llama_quantize import copied_file, find_quantizer, quantize
from calpaca.core.export.modelfile import MODELFILE, modelfile
from calpaca.core.export.source import Source, read_source
from calpaca.core.files import ModelFiles
from calpaca.core.lock import exclusive
from calpaca.core.template import ChatTemplate
from calpaca.core.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from calpaca.core.jobs import Ledger

logger = logging.getLogger("calpaca")


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
        return ExportCheck(count, texts, **self._logits(file, self.type.ggml, logits))

    def check_quantized(self, file: Path, kind: str, *, logits: bool = True) -> ExportCheck:
        """Compare a file that llama.cpp quantized: names and shapes of the tensors, vocabulary, logits."""
        count = check_shapes(file, self.tensors)
        texts = check_vocabulary(file, self.vocabulary, self.tokenizer, self.template)
        return ExportCheck(count, texts, **self._logits(file, kind, logits))

    def _logits(self, file: Path, kind: str, wanted: bool) -> dict[str, Any]:
        if not wanted:
            return {"reason": "logits were not compared"}
        return check_logits(file, self.source, kind)


@dataclass
class _Checked:
    """What the check found, once the file has been written."""

    result: ExportCheck | None = None


def export_gguf(
    files: ModelFiles, output: Path, jobs: Ledger, options: GgufOptions | None = None, command: Command | None = None
) -> tuple[Manifest, ExportCheck]:
    """Write a folder with a GGUF file, a Modelfile and a manifest; returns the manifest and what was compared.

    Adapters are merged on the way. Raises what `plan_gguf` and `write_model` raise, and ModelError when the file, read
    back, is not what was exported; then no output appears.
    """
    options = options or GgufOptions()
    program = find_quantizer() if options.type in K_QUANTS else None
    if program is not None:
        return _export_quantized(program, files, output, jobs, options=options, command=command)
    return _write(plan_gguf(files, options), output, jobs, options, command)


def _write(
    export: GgufExport, output: Path, jobs: Ledger, options: GgufOptions, command: Command | None
) -> tuple[Manifest, ExportCheck]:
    _tell(export)
    checked = _Checked()

    def check(folder: Path) -> None:
        checked.result = export.check(folder / export.file_name, logits=options.logits)

    manifest = write_model(replace(export.model, check=check), output, jobs, command)
    assert checked.result is not None
    return manifest, checked.result


def _export_quantized(
    program: Path, files: ModelFiles, output: Path, jobs: Ledger, *, options: GgufOptions, command: Command | None
) -> tuple[Manifest, ExportCheck]:
    """By way of an f16 file beside the output, which is removed again."""
    check_output(output)
    half = plan_gguf(files, replace(options, type="f16"))
    _tell(half)
    name = f"model-{options.type}.gguf"
    checked = _Checked()
    halfway = output.with_name(f"{output.name}-f16")
    with (
        exclusive(halfway),  # it also removes what a killed run left
        TemporaryDirectory(prefix=f".{halfway.name}.", suffix=".part", dir=output.absolute().parent) as temporary,
    ):
        whole, small = Path(temporary) / "f16", Path(temporary) / name
        write_model(half.model, whole, jobs)
        quantize(program, whole / half.file_name, small, options.type)

        def check(folder: Path) -> None:
            checked.result = half.check_quantized(folder / name, options.type.upper(), logits=options.logits)

        settings = {"format": "gguf", "type": options.type, "pre": half.vocabulary.pre}
        model = ModelPlan(
            (copied_file(small, name),),
            partial(_lineage, half.source, settings, half.template),
            (small,),
            settings,
            {MODELFILE: modelfile(f"./{name}", half.template, add_bos=half.vocabulary.add_bos).encode()},
            check,
        )
        manifest = write_model(model, output, jobs, command)
    assert checked.result is not None
    return manifest, checked.result


def _tell(export: GgufExport) -> None:
    for note in export.notes:
        logger.warning("%s", note)


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
    template = template_of(tokenizer, files)
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
