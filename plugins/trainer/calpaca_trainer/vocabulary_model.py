"""A model with a longer vocabulary: rows for the new tokens, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from calpaca.core.adapters import HEAD
from calpaca.core.checkpoint.lineage import input_of, versions
from calpaca.core.checkpoint.manifest import Lineage
from calpaca.core.checkpoint.plan import Buffer, ModelPlan, PlannedTensor, buffer_of, copied, hugging_face_files
from calpaca.core.convert.tokenizer_files import TokenizerFiles, find_tokenizer, template_digest
from calpaca.core.errors import ModelError
from calpaca.core.fingerprint import model_files
from calpaca.core.merge.base_model import BaseModel, read_base
from calpaca_trainer.vocabulary import MergedVocabulary, old_pieces, read_pieces

if TYPE_CHECKING:
    from torch import Tensor

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_TAKEN_ALONG = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Extension:
    """`base` is the `ModelProto` of the model's vocabulary, `merged` what it becomes."""

    base: Any
    merged: MergedVocabulary
    filters: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.base.pieces) + len(self.merged.added)


def tokenizer_files(extension: Extension, settings: Path | None = None) -> TokenizerFiles:
    """`tokenizer.model` and the Hugging Face files that give its ids; a chat template is that of the folder `settings`."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(extension.merged.data)
        for file in _SETTINGS:
            if settings is not None and (settings / file).is_file():
                (folder / file).write_bytes((settings / file).read_bytes())
        return find_tokenizer(folder)


def plan_extension(model: Path, extension: Extension, name: str) -> ModelPlan:
    """Plan the model in the folder `model` with rows for the new tokens. Each new row, of the embeddings and of the output
    layer, is the mean of the rows of the pieces that stood for it so far, in float32 and rounded once.

    Raises ModelError where the model and the vocabulary do not belong together.
    """
    base = read_base(model)
    _check(base, extension)
    ids = old_pieces(extension.base, extension.merged.added)
    tensors = [
        _extended(base, tensor, extension, ids) if tensor in {base.embedding, HEAD} else copied(base.checkpoint, tensor)
        for tensor in base.tensors
    ]
    tokenizer = tokenizer_files(extension, model)
    texts = _texts(base, extension, tokenizer)
    settings = {
        "pieces_before": len(extension.base.pieces), "pieces_after": extension.size, "filters": list(extension.filters)
    }  # fmt: skip
    return ModelPlan(
        hugging_face_files(tensors),
        lambda: Lineage("vocab merge", (input_of("base", name, model),), settings, template_digest(texts), versions()),
        tuple(model_files(model)),
        settings,
        texts,
    )


def _check(base: BaseModel, extension: Extension) -> None:
    pieces = len(extension.base.pieces)
    if base.embedding is None:
        raise ModelError(f"{base.path} has no embeddings that are known.", "Name a LLaMA-style model folder.")
    rows = base.tensors[base.embedding].shape[0]
    if rows < pieces:
        raise ModelError(
            f"{base.path} has {rows} embedding rows, but the base vocabulary {pieces} pieces.",
            "Name the vocabulary that belongs to the model.",
        )
    own = base.path / "tokenizer.model"
    if own.is_file() and [piece.piece for piece in read_pieces(own).pieces] != [
        piece.piece for piece in extension.base.pieces
    ]:
        raise ModelError(
            f"The base vocabulary is not the one of {base.path}.", f"Name {own} as the base, or another model."
        )


def _extended(base: BaseModel, name: str, extension: Extension, ids: Sequence[Sequence[int]]) -> PlannedTensor:
    stored = base.tensors[name]
    kept = len(extension.base.pieces)
    return PlannedTensor(
        name,
        stored.dtype,
        (extension.size, *stored.shape[1:]),
        partial(_rows, base, name, kept, ids),
        f"{stored.file.name}: {name}, {kept} rows and {len(ids)} means",
        memory=2 * stored.size,
    )


def _rows(base: BaseModel, name: str, kept: int, ids: Sequence[Sequence[int]]) -> Iterator[Buffer]:
    """The rows of the old tokens, without those that only fill the tensor up, and then the means."""
    weight = base.checkpoint.read(name)
    yield buffer_of(weight[:kept])
    yield buffer_of(_means(weight, ids))


def _means(weight: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    import torch

    rows = [weight[list(each)].float().mean(0) for each in ids]
    return torch.stack(rows).to(weight.dtype) if rows else weight[:0]


def _texts(base: BaseModel, extension: Extension, tokenizer: TokenizerFiles) -> dict[str, bytes | Path]:
    texts: dict[str, bytes | Path] = {
        file.name: file for pattern in _TAKEN_ALONG for file in sorted(base.path.glob(pattern)) if file.is_file()
    }
    config: dict[str, Any] = deepcopy(dict(base.config))
    nested = config.get("text_config", config)
    nested["vocab_size"] = extension.size
    if "pad_token_id" in tokenizer.special_ids:
        nested["pad_token_id"] = tokenizer.special_ids["pad_token_id"]
    return {**texts, "config.json": _json(config), **tokenizer.texts}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
