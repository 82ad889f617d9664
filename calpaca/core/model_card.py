"""What a model on disk is: architecture, size, vocabulary, context length, dtype, licence, fingerprint.

Read from headers and configuration files alone: no weights are loaded and no torch is needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calpaca.core.catalogue import ENTRIES
from calpaca.core.checkpoint.dtypes import NAMES
from calpaca.core.checkpoint.safetensors import read_tensors
from calpaca.core.errors import CorruptFileError
from calpaca.core.fingerprint import fingerprint, model_files
from calpaca.core.gguf import read_header
from calpaca.core.sources import Found


@dataclass(frozen=True)
class ModelCard:
    """None where the files do not say. `size` is bytes on disk, `context_length` tokens, `base` an adapter's base."""

    name: str
    path: Path
    source: str
    format: str
    size: int
    fingerprint: str
    architecture: str | None = None
    parameters: int | None = None
    vocabulary: int | None = None
    context_length: int | None = None
    dtype: str | None = None
    licence: str | None = None
    base: str | None = None


def read_card(found: Found) -> ModelCard:
    """Describe a model folder, an adapter folder or a GGUF file. Raises CorruptFileError or ModelNotFoundError."""
    return _folder_card(found) if found.path.is_dir() else _gguf_card(found)


def _folder_card(found: Found) -> ModelCard:
    adapter = _read_json(found.path / "adapter_config.json")
    config = _read_json(found.path / "config.json")
    text = config.get("text_config", config)  # models for several media nest the language model
    counts = _count_elements(found.path)
    names = config.get("architectures") or ([adapter["peft_type"]] if "peft_type" in adapter else [None])
    return ModelCard(
        name=found.name,
        path=found.path,
        source=found.source,
        format="adapter" if adapter and not config else "hf",
        size=sum(file.stat().st_size for file in model_files(found.path)),
        fingerprint=fingerprint(found.path),
        architecture=names[0],
        parameters=counts.total() or None,
        vocabulary=text.get("vocab_size"),
        context_length=text.get("max_position_embeddings"),
        dtype=_main_dtype(counts) or config.get("dtype") or config.get("torch_dtype"),
        licence=_catalogue_licence(found) or _readme_licence(found.path),
        base=adapter.get("base_model_name_or_path"),
    )


def _gguf_card(found: Found) -> ModelCard:
    header = read_header(found.path)
    metadata = header.metadata
    context_length = header.of_architecture("context_length")
    return ModelCard(
        name=found.name,
        path=found.path,
        source=found.source,
        format="gguf",
        size=found.path.stat().st_size,
        fingerprint=fingerprint(found.path),
        architecture=str(metadata["general.architecture"]) if "general.architecture" in metadata else None,
        parameters=header.parameters,
        vocabulary=header.arrays.get("tokenizer.ggml.tokens"),
        context_length=int(context_length) if context_length is not None else None,
        dtype=header.main_type,
        licence=_catalogue_licence(found) or str(metadata.get("general.license") or "") or None,
    )


def stored_dtype(path: Path) -> str | None:
    """What most weights of a folder or file are stored as: `bfloat16`, or ggml's name such as `Q4_1`."""
    if path.suffix == ".gguf":
        main = read_header(path).main_type
        return NAMES.get(main, main) if main is not None else None
    return _main_dtype(_count_elements(path))


def _count_elements(folder: Path) -> Counter[str]:
    """Elements of each dtype over all safetensors files; empty for a model in `.bin` files."""
    counts: Counter[str] = Counter()
    for file in model_files(folder):
        if file.suffix == ".safetensors":
            for tensor in read_tensors(file).values():
                counts[tensor.dtype] += tensor.elements
    return counts


def _main_dtype(counts: Counter[str]) -> str | None:
    most = counts.most_common(1)
    return NAMES.get(most[0][0], most[0][0]) if most else None


def _read_json(file: Path) -> Mapping[str, Any]:
    """The object in the file; an empty one where there is no file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{file} is not valid JSON: {error}.", "Fetch the file again.") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{file} holds no JSON object.", "Fetch the file again.")
    return value


def _catalogue_licence(found: Found) -> str | None:
    entry = ENTRIES.get(found.name)
    return entry.licence if entry is not None and found.source != "local" else None


def _readme_licence(folder: Path) -> str | None:
    """`license:` in the front matter of a hub's model card."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    _, _, rest = readme.read_text("utf-8", errors="replace").partition("---\n")
    front = rest.partition("\n---")[0]
    lines = (line.partition(":") for line in front.splitlines())
    return next((value.strip() for key, _, value in lines if key == "license"), None)
