"""What headers and configuration say about a model, alike for Hugging Face folders, GGUF files and original LLaMA."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from calpaca.core.checkpoint.dtypes import NAMES
from calpaca.core.checkpoint.manifest import read_manifest
from calpaca.core.checkpoint.reader import open_checkpoint, read_file
from calpaca.core.checkpoint.tensor import StoredTensor
from calpaca.core.convert.source import is_original
from calpaca.core.errors import CorruptFileError, ModelNotFoundError
from calpaca.core.fingerprint import model_files
from calpaca.core.gguf import Header, read_header
from calpaca.core.tokenizer import stored_template

_GGUF_KEYS = {
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "embedding_length": "hidden_size", "context_length": "max_position_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """`config` has the keys of `config.json`, of the language model alone; `adapter` is an `adapter_config.json`.

    `shapes` and `elements` (by dtype) are empty where there are no weights, or ones that need PyTorch and it is missing. `template` is the
    source of the chat template.
    """

    format: str
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    elements: Counter[str] = field(default_factory=Counter)
    template: str | None = None
    licence: str | None = None

    @property
    def dtype(self) -> str | None:
        """What most weights are stored as: `bfloat16`, or ggml's name such as `Q4_1`."""
        if not self.elements:
            return self.config.get("dtype") or self.config.get("torch_dtype")
        main = self.elements.most_common(1)[0][0]
        return NAMES.get(main, main)


def read_facts(path: Path) -> ModelFacts:
    """Read a model folder, an adapter folder or a GGUF file. Raises CorruptFileError or ModelNotFoundError."""
    if path.is_file():
        return _of_gguf(read_header(path))
    if is_original(path):
        return _of_original(path)
    return _of_folder(path)


def _of_folder(folder: Path) -> ModelFacts:
    adapter = read_json(folder / "adapter_config.json")
    config = read_json(folder / "config.json")
    tensors = _tensors(folder)
    return ModelFacts(
        format="adapter" if adapter and not config else "hf",
        config={**config, **config.get("text_config", {})},  # models for several media nest the language model
        adapter=adapter,
        shapes={name: stored.shape for name, stored in tensors.items()},
        elements=_count({name: (stored.dtype, stored.elements) for name, stored in tensors.items()}),
        template=stored_template(folder),
        licence=_readme_licence(folder),
    )


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors, those in the modules of a sentence-transformers model too."""
    try:
        tensors = dict(open_checkpoint(folder).tensors)
    except (ModelNotFoundError, ModuleNotFoundError):  # no weights, or ones that need PyTorch
        tensors = {}
    for file in model_files(folder):
        if file.parent != folder and file.suffix == ".safetensors":
            inner = file.parent.relative_to(folder).as_posix()
            tensors |= {f"{inner}/{name}": stored for name, stored in read_file(file).items()}
    return tensors


def _of_original(folder: Path) -> ModelFacts:
    from calpaca.core.convert.architecture import to_config
    from calpaca.core.convert.parts import open_original

    try:
        original = open_original(folder)
    except ModuleNotFoundError:  # its parts need PyTorch
        return ModelFacts("pth")
    manifest = read_manifest(folder)
    told = manifest.lineage.settings.get("context_length") if manifest is not None else None
    config = to_config(original.architecture, "", {})
    return ModelFacts(
        format="pth",
        config={**config, "max_position_embeddings": told or config["max_position_embeddings"]},
        shapes={tensor.name: tensor.shape for tensor in original.tensors},
        elements=_count({tensor.name: (tensor.dtype, prod(tensor.shape)) for tensor in original.tensors}),
    )


def _of_gguf(header: Header) -> ModelFacts:
    stated = {name: header.of_architecture(key) for key, name in _GGUF_KEYS.items()}
    kind = header.metadata.get("general.architecture")
    return ModelFacts(
        format="gguf",
        config={
            "architectures": [str(kind)] if kind is not None else [],
            "vocab_size": header.arrays.get("tokenizer.ggml.tokens"),
            **{name: int(value) for name, value in stated.items() if value is not None},
        },
        shapes={tensor.name: tensor.shape[::-1] for tensor in header.tensors},  # ggml counts from the innermost
        elements=Counter({header.main_type: header.parameters} if header.main_type is not None else {}),
        template=_text(header, "tokenizer.chat_template"),
        licence=_text(header, "general.license"),
    )


def _text(header: Header, key: str) -> str | None:
    return str(header.metadata.get(key) or "") or None


def _count(tensors: Mapping[str, tuple[str, int]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for dtype, elements in tensors.values():
        counts[dtype] += elements
    return counts


def read_json(file: Path) -> Mapping[str, Any]:
    """The object in the file; an empty one where there is no file. Raises CorruptFileError for anything else."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{file} is not valid JSON: {error}.", "Fetch the file again.") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{file} holds no JSON object.", "Fetch the file again.")
    return value


def _readme_licence(folder: Path) -> str | None:
    """`license:` in the front matter of a hub's model card."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    _, _, rest = readme.read_text("utf-8", errors="replace").partition("---\n")
    front = rest.partition("\n---")[0]
    lines = (line.partition(":") for line in front.splitlines())
    return next((value.strip() for key, _, value in lines if key == "license"), None)
