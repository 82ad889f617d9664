"""Weights in the form of a native engine: a GGUF file, made once from whatever a model consists of."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from calpaca.core import gguf
from calpaca.core.disk import check_space, disk_errors
from calpaca.core.engines.retyped import matrix_types, retype
from calpaca.core.errors import AdapterError, UnsupportedError, UsageError
from calpaca.core.files import AdapterFiles, ModelFiles
from calpaca.core.lock import exclusive
from calpaca.core.paths import atomic_file, cache_dir

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime

logger = logging.getLogger("calpaca")

_RECIPE = 1  # part of the cache's key: a better preparation must not find the older one's result
_BYTES = {"F32": 4.0, "F16": 2.0, "Q8_0": 34 / 32}


def gguf_weights(files: ModelFiles, runtime: Runtime, engine: str, accepted: frozenset[str] | None = None) -> Path:
    """The model as one GGUF file. A file of the user's own is taken as it is where all of its matrices have a type that
    is `accepted` (None: any) and nothing is to be put on it; everything else is written to the cache once.

    Raises ModelError for what cannot be written as GGUF, DownloadError where the disk is full.
    """
    own = _own_file(files, runtime)
    wanted = _wanted_type(files, accepted)
    if own is not None and files.spec.quantization is None:
        types = matrix_types(own)
        if accepted is None or types <= accepted:
            return own
    folder = _place(files, wanted, "rewritten" if own is not None else "exported")
    target = folder / f"model-{wanted.lower()}.gguf"
    if not target.is_file():
        logger.warning("Preparing %s for the engine %s: its weights as %s, once.", files.name, engine, wanted)
        if own is not None:
            _write_again(own, wanted, target)
        else:
            _export(files, wanted, folder, runtime)
    return target


def gguf_with_lora(
    files: ModelFiles, runtime: Runtime, engine: str, accepted: frozenset[str] | None = None
) -> tuple[Path, tuple[AdapterFiles, ...]]:
    """The model as a GGUF file, and GGUF LoRA files to put on it: so a quantized file of the user's own stays as it is.

    Adapters are merged, as in `gguf_weights`, where the file cannot stay anyway or one of them is more than LoRA.
    """
    base = replace(files, adapters=())
    own = _own_file(base, runtime) if files.adapters and files.spec.quantization is None else None
    if own is not None and (accepted is None or matrix_types(own) <= accepted):
        adapters = _lora_files(files, runtime)
        if adapters is not None:
            return own, adapters
    return gguf_weights(files, runtime, engine, accepted), ()


def _lora_files(files: ModelFiles, runtime: Runtime) -> tuple[AdapterFiles, ...] | None:
    """Each adapter as a GGUF file; None where one changes the vocabulary or is anything but low-rank factors."""
    from calpaca.core.tokenizer import load_tokenizer

    if files.tokenizer != files.weights and len(load_tokenizer(files.tokenizer)) != len(load_tokenizer(files.weights)):
        return None
    try:
        return tuple(lora_file(files, adapter, runtime) for adapter in files.adapters)
    except (UnsupportedError, AdapterError) as error:
        logger.info("The adapters are merged: %s", error)
        return None


def lora_file(files: ModelFiles, adapter: AdapterFiles, runtime: Runtime) -> AdapterFiles:
    """An adapter of a model as a GGUF file of its factors, written once. Its scale is no part of the file.

    Raises UnsupportedError for more than low-rank factors, AdapterError for an adapter of another base.
    """
    from calpaca.core.checkpoint.write import write_model
    from calpaca.core.export.lora import plan_lora

    alone = replace(files, adapters=(replace(adapter, scale=1.0),), tokenizer=files.weights, template=None)
    export = plan_lora(alone, files.name)
    folder = _place(alone, "F32", "lora")
    target = folder / export.file_name
    if not target.is_file():
        _write_once(partial(write_model, export.model, folder, runtime.jobs), folder)
    return replace(adapter, path=target)


def _own_file(files: ModelFiles, runtime: Runtime) -> Path | None:
    """The GGUF file that the model was named by, where nothing else goes into the weights or the vocabulary."""
    from calpaca.core.sources import resolve_model

    if files.adapters:
        return None
    path = resolve_model(files.spec.model, runtime, revision=files.spec.revision).path
    return path if path.suffix == ".gguf" and path.is_file() else None


def _wanted_type(files: ModelFiles, accepted: frozenset[str] | None) -> str:
    if files.spec.quantization == "8bit":
        return "Q8_0"
    return "F32" if files.spec.dtype == "float32" and (accepted is None or "F32" in accepted) else "F16"


def _place(files: ModelFiles, wanted: str, how: str) -> Path:
    key = hashlib.sha256(f"{files.fingerprint} {wanted} {how} {_RECIPE}".encode()).hexdigest()
    return cache_dir() / "prepared" / key[:32]


def _write_again(own: Path, wanted: str, target: Path) -> None:
    needed = int(gguf.read_header(own).parameters * _BYTES[wanted])
    with exclusive(target):
        if not target.is_file():
            check_space(target.parent, needed, own.name)
            with disk_errors(target.parent, own.name, needed), atomic_file(target) as unfinished:
                retype(own, wanted, unfinished)


def _export(files: ModelFiles, wanted: str, folder: Path, runtime: Runtime) -> None:
    """Adapters are merged tensor by tensor on the way; an export that was interrupted goes on."""
    from calpaca.core.checkpoint.write import write_model
    from calpaca.core.export.gguf_export import GgufOptions, plan_gguf

    export = plan_gguf(files, GgufOptions(wanted.lower()))
    for note in export.notes:
        logger.info("%s", note)
    _write_once(partial(write_model, export.model, folder, runtime.jobs), folder)


def _write_once(write: Callable[[], object], folder: Path) -> None:
    try:
        write()
    except UsageError:
        if not folder.is_dir():  # another process was faster
            raise
