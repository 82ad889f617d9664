"""Planning a conversion: from an original checkpoint, a Hugging Face folder or a GGUF file to either of the first two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calpaca.core import gguf
from calpaca.core.checkpoint.dtypes import NAMES, SIZES, code_of, to_torch
from calpaca.core.checkpoint.lineage import input_of, versions
from calpaca.core.checkpoint.manifest import CONTEXT_LENGTH, MANIFEST, Lineage, read_manifest
from calpaca.core.checkpoint.plan import (
    SHARD_SIZE,
    Container,
    ModelPlan,
    PlannedTensor,
    bytes_of,
    computed,
    copied,
    hugging_face_files,
)
from calpaca.core.checkpoint.reader import open_checkpoint
from calpaca.core.convert.architecture import Architecture, to_config
from calpaca.core.convert.json_file import read_object
from calpaca.core.convert.names import HF_EMBEDDINGS, is_buffer
from calpaca.core.convert.parts import open_original, pth_files, pth_params
from calpaca.core.convert.source import PARAMS, Source, identify, part_files
from calpaca.core.convert.tokenizer_files import (
    HF_FILES,
    MODEL_FILE,
    TokenizerFiles,
    find_tokenizer,
    original_tokenizer,
    template_digest,
)
from calpaca.core.errors import ModelError, ModelNotFoundError, UsageError
from calpaca.core.fingerprint import model_files
from calpaca.core.tokenizer import has_tokenizer, load_tokenizer
from calpaca.core.weights import check_vocabulary

if TYPE_CHECKING:
    import torch

Form = Literal["hf", "pth"]

_GENERATION = "generation_config.json"
_WEIGHTS = {".safetensors", ".bin", ".pth", ".pt", ".gguf"}
_LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*", "README.md")
_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Target:
    """What to make. None is what suits the source: Hugging Face's form, or `.pth` where `parts` are asked for; the
    dtype as it is; one part.

    `shard_size` is in bytes, `context_length` in tokens; `tokenizer` is a folder or a `tokenizer.model`, for an
    original checkpoint that lies without one.
    """

    form: Form | None = None
    container: Container | None = None
    shard_size: int | None = None
    parts: int | None = None
    dtype: str | None = None
    context_length: int | None = None
    tokenizer: Path | None = None

    @property
    def to(self) -> Form:
        return self.form or ("pth" if self.parts else "hf")

    def __str__(self) -> str:
        if self.to == "pth":
            return f"an original LLaMA checkpoint in {self.parts or 1} part{'s' * ((self.parts or 1) > 1)} (.pth)"
        return f"a Hugging Face folder ({'pytorch_model.bin' if self.container == 'torch' else 'safetensors'})"


@dataclass(frozen=True)
class Conversion:
    """What was found and what it is to become. `plan` is None when it is that already; `notes` are for a person."""

    source: Source
    target: Target
    plan: ModelPlan | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Model:
    """A source as whole tensors under Hugging Face names; `folder` has its small files."""

    folder: Path
    tensors: tuple[PlannedTensor, ...]
    config: Mapping[str, Any]
    tokenizer: TokenizerFiles | None
    notes: tuple[str, ...] = ()


def plan_conversion(path: Path, target: Target | None = None) -> Conversion:
    """Plan the conversion of what lies at `path`. Reads headers, configuration and tokenizer, no weights.

    A GGUF file is dequantized into the cache first. Raises ModelError for a source that is damaged or cannot take the
    form, UsageError for a target that contradicts itself.
    """
    target = target or Target()
    _check_target(target)
    source = identify(path)
    if _is_already(source, target):
        return Conversion(source, target, None)
    model = _read_original(source.path, target) if source.kind == "pth" else _read_hugging_face(source, target)
    tensors = tuple(_cast(tensor, target.dtype) for tensor in model.tensors)
    config = dict(model.config) | _dtype_of(model.config, tensors)
    model = replace(model, tensors=tensors, config=config)
    if target.to == "pth":
        files, texts = pth_files(tensors, config, target.parts or 1), _pth_texts(model)
    else:
        files = hugging_face_files(tensors, target.container or "safetensors", target.shard_size or SHARD_SIZE)
        texts = _hugging_face_texts(model)
    settings = {
        "from": source.kind,
        "to": target.to,
        "dtype": target.dtype,
        CONTEXT_LENGTH: config.get("max_position_embeddings"),
    }
    plan = ModelPlan(files, partial(_lineage, source, texts, settings), _inputs(source), settings, texts)
    return Conversion(source, target, plan, model.notes)


def _check_target(target: Target) -> None:
    if target.to == "hf" and target.parts is not None:
        raise UsageError("A Hugging Face folder has no parts.", "Use --to pth, or --shard-size for its files.")
    if target.to == "pth" and (target.container is not None or target.shard_size is not None):
        raise UsageError("An original checkpoint is laid out in parts.", "Use --parts instead, or --to hf.")
    if target.dtype is not None and target.dtype not in _FLOATS:
        raise UsageError(f"Unknown dtype '{target.dtype}'.", f"Use one of {', '.join(_FLOATS)}.")


def _is_already(source: Source, target: Target) -> bool:
    if target.dtype is not None:
        return False
    if target.to == "pth":
        return source.kind == "pth" and target.parts in {None, len(part_files(source.path))}
    return target.shard_size is None and source.kind == ("bin" if target.container == "torch" else "safetensors")


# ---- reading either form ------------------------------------------------------------------------------------------


def _read_original(folder: Path, target: Target) -> _Model:
    original = open_original(folder)
    found, notes = _with_context_length(original.architecture, folder, target)
    tokenizer = _find_tokenizer(folder, found, target)
    if tokenizer is None:
        notes += ("No tokenizer.model lies there or in the folder above: name one with --tokenizer.",)
    else:
        check_vocabulary(tokenizer.size, found.vocabulary)
    dtype = NAMES[original.tensors[0].dtype]
    config = to_config(found, dtype, tokenizer.special_ids if tokenizer else {})
    return _Model(folder, original.tensors, config, tokenizer, notes)


def _with_context_length(found: Architecture, folder: Path, target: Target) -> tuple[Architecture, tuple[str, ...]]:
    manifest = read_manifest(folder)
    told = target.context_length or (manifest.lineage.settings.get(CONTEXT_LENGTH) if manifest else None)
    if told:
        return replace(found, context_length=int(told)), ()
    note = (
        f"params.json does not say the context length: {found.context_length} is taken (--context-length changes it)."
    )
    return found, (note,)


def _find_tokenizer(folder: Path, found: Architecture, target: Target) -> TokenizerFiles | None:
    places = [target.tokenizer] if target.tokenizer else [folder, folder.absolute().parent]
    for place in places:
        if (
            place.is_file()
            or (place / MODEL_FILE).is_file()
            or (place == folder and (place / "tokenizer.json").is_file())
        ):
            instruct = "instruct" in folder.absolute().name.lower()
            return find_tokenizer(place, llama31=found.rope_scaling is not None, instruct=instruct)
    if target.tokenizer:
        raise ModelNotFoundError(f"{target.tokenizer} holds no tokenizer.", "Name a tokenizer.model, or its folder.")
    return None


def _read_hugging_face(source: Source, target: Target) -> _Model:
    folder = gguf.hf_folder(source.path) if source.kind == "gguf" else source.path
    checkpoint, config = open_checkpoint(folder), read_object(folder / "config.json")
    tensors = tuple(copied(checkpoint, name) for name in checkpoint.tensors if not is_buffer(name))
    if not has_tokenizer(folder):
        return _Model(folder, tensors, config, None, ("The model has no tokenizer beside it.",))
    tokenizer = find_tokenizer(folder) if target.to == "hf" else None
    if HF_EMBEDDINGS in checkpoint.tensors:
        size = tokenizer.size if tokenizer else len(load_tokenizer(folder))
        check_vocabulary(size, checkpoint.tensors[HF_EMBEDDINGS].shape[0])
    return _Model(folder, tensors, config, tokenizer)


def _cast(tensor: PlannedTensor, dtype: str | None) -> PlannedTensor:
    """The tensor in another dtype, rounded once. Integers stay as they are."""
    if dtype is None or NAMES.get(tensor.dtype) == dtype or NAMES.get(tensor.dtype) not in _FLOATS:
        return tensor
    return computed(
        tensor.name,
        code_of(dtype),
        tensor.shape,
        partial(_converted, tensor, dtype),
        origin=f"{tensor.origin} as {dtype}",
        memory=tensor.size,
    )


def _converted(tensor: PlannedTensor, dtype: str) -> torch.Tensor:
    import torch

    data = torch.empty(tensor.size, dtype=torch.uint8)
    view, position = bytes_of(data), 0
    for chunk in tensor.chunks():
        view[position : position + len(chunk)] = chunk
        position += len(chunk)
    before = data.view(to_torch(tensor.dtype)).reshape(tensor.shape)
    after = before.to(to_torch(code_of(dtype)))
    if not bool(torch.isfinite(after).all()) and bool(torch.isfinite(before).all()):
        largest = float(before.abs().max())
        raise ModelError(f"{tensor.name} holds {largest:g}, which {dtype} cannot.", "Use --dtype bfloat16.")
    return after


def _dtype_of(config: Mapping[str, Any], tensors: tuple[PlannedTensor, ...]) -> dict[str, str]:
    """The dtype of most numbers under the key that the configuration has for it."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size // SIZES[tensor.dtype]
    return {"dtype" if "dtype" in config else "torch_dtype": NAMES[max(sizes, key=sizes.__getitem__)]}


# ---- small files --------------------------------------------------------------------------------------------------


def _hugging_face_texts(model: _Model) -> dict[str, bytes | Path]:
    texts: dict[str, bytes | Path] = dict(_small_files(model.folder))
    texts["config.json"] = _json(model.config)
    if model.tokenizer is not None:
        texts = {name: content for name, content in texts.items() if name not in {*HF_FILES, MODEL_FILE}}
        texts |= model.tokenizer.texts
    if _GENERATION not in texts:
        ids = {name: model.config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        texts[_GENERATION] = _json({name: index for name, index in ids.items() if index is not None})
    return texts


def _pth_texts(model: _Model) -> dict[str, bytes | Path]:
    kept = {_GENERATION, *HF_FILES, MODEL_FILE}
    texts: dict[str, bytes | Path] = {
        name: file for name, file in _small_files(model.folder).items() if name in kept or file.suffix in {"", ".md"}
    }
    texts |= original_tokenizer(model.folder) or (model.tokenizer.texts if model.tokenizer else {})
    return texts | {PARAMS: pth_params(model.tensors, model.config)}


def _small_files(folder: Path) -> dict[str, Path]:
    """Configuration, tokenizer, code and licences beside the weights, without what only fits these files."""
    files = [file for file in model_files(folder) if file.suffix not in _WEIGHTS and file.parent == folder]
    files += [file for pattern in _LICENCES for file in folder.glob(pattern) if file.is_file()]
    return {file.name: file for file in files if file.name not in {MANIFEST, PARAMS} and ".index." not in file.name}


def _lineage(source: Source, texts: Mapping[str, bytes | Path], settings: Mapping[str, Any]) -> Lineage:
    return Lineage(
        operation="convert",
        inputs=(input_of("base", source.path.name, source.path),),
        settings=settings,
        template=template_digest(texts),
        versions=versions(),
    )


def _inputs(source: Source) -> tuple[Path, ...]:
    return (source.path,) if source.path.is_file() else tuple(model_files(source.path))


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
