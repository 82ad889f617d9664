"""The model that adapters are merged into: its tensors and configuration, and whether its two ends are tied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from calpaca.core.adapters import HEAD
from calpaca.core.checkpoint.reader import Checkpoint, open_checkpoint
from calpaca.core.checkpoint.tensor import StoredTensor
from calpaca.core.errors import CorruptFileError, ModelNotFoundError

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose linear layers are `Conv1D`: their weights lie as [in, out]."""


@dataclass(frozen=True)
class BaseModel:
    """A Hugging Face model folder, from headers alone."""

    path: Path
    checkpoint: Checkpoint
    config: Mapping[str, Any]

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the configuration; models for several media nest it."""
        nested: Mapping[str, Any] = self.config.get("text_config", self.config)
        return nested

    @cached_property
    def embedding(self) -> str | None:
        """Name of the input embeddings' tensor."""
        names = (name for name in self.checkpoint.tensors if name.endswith(_EMBEDDINGS))
        return next(names, None)

    @cached_property
    def tied(self) -> bool:
        """Whether the output layer is the input embeddings: by the configuration, unless both lie here and differ."""
        stored = HEAD in self.checkpoint.tensors
        stated = self.text_config.get("tie_word_embeddings", self.config.get("tie_word_embeddings", not stored))
        if not stated or self.embedding is None:
            return False
        return not stored or same_bytes(self.checkpoint, self.embedding, self.checkpoint, HEAD)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors, without the output layer where it is tied. Raises CorruptFileError where it is missing."""
        tensors = dict(self.checkpoint.tensors)
        if self.tied:
            tensors.pop(HEAD, None)
        elif self.embedding is not None and HEAD not in tensors and _is_causal(self.config):
            raise CorruptFileError(
                f"{self.path} has no {HEAD}, though its configuration says that the embeddings are not tied.",
                "Fetch all of its files.",
            )
        return tensors

    @property
    def transposed(self) -> bool:
        """Whether the weights of linear layers lie as [in, out]."""
        return self.text_config.get("model_type") in _TRANSPOSED

    def has_bias(self, module: str) -> bool:
        return f"{module}.bias" in self.tensors


def read_base(folder: Path) -> BaseModel:
    """Open a model folder. Raises ModelNotFoundError or CorruptFileError."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelNotFoundError(f"{folder} has no config.json.", "Name a Hugging Face model folder.") from None
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{file} cannot be read: {error}.", "Fetch the file again.") from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{file} holds no object.", "Fetch the file again.")
    return BaseModel(folder, open_checkpoint(folder), config)


def same_bytes(a: Checkpoint, name_a: str, b: Checkpoint, name_b: str) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    left, right = a.tensors[name_a], b.tensors[name_b]
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return all(x == y for x, y in zip(a.chunks(name_a), b.chunks(name_b), strict=True))


def _is_causal(config: Mapping[str, Any]) -> bool:
    return any("CausalLM" in str(name) for name in config.get("architectures") or ())
