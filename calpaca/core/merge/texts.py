"""The small files of a merged model: configuration, tokenizer and chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

from calpaca.core.adapters import HEAD
from calpaca.core.checkpoint.dtypes import NAMES
from calpaca.core.convert.tokenizer_files import TokenizerFiles, find_tokenizer
from calpaca.core.files import ModelFiles
from calpaca.core.merge.base_model import BaseModel
from calpaca.core.merge.recipe import Recipe
from calpaca.core.tokenizer import has_tokenizer

_TEMPLATE = "chat_template.jinja"
_TAKEN_ALONG = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*", "*.py")


def small_files(
    files: ModelFiles, base: BaseModel, made: Mapping[str, Recipe], tokenizer: TokenizerFiles | None
) -> dict[str, bytes | Path]:
    """Name → contents. Configuration, licence and code are the base's; those in an adapter's folder are not taken."""
    texts: dict[str, bytes | Path] = {
        file.name: file for pattern in _TAKEN_ALONG for file in sorted(base.path.glob(pattern)) if file.is_file()
    }
    texts["config.json"] = _json(merged_config(base, made))
    texts |= tokenizer.texts if tokenizer is not None else {}
    if files.template is not None:
        texts[_TEMPLATE] = files.template.source.encode()
    return texts


def merged_tokenizer(files: ModelFiles) -> TokenizerFiles | None:
    """The tokenizer that goes with the merged model; None where there is none beside the base and the adapters."""
    return find_tokenizer(files.tokenizer) if has_tokenizer(files.tokenizer) else None


def merged_config(base: BaseModel, made: Mapping[str, Recipe]) -> dict[str, Any]:
    """The base's configuration, with vocabulary, tie and dtype as the tensors have them."""
    config: dict[str, Any] = deepcopy(dict(base.config))
    nested = config.get("text_config", config)
    if base.embedding is not None:
        nested["vocab_size"] = made[base.embedding].shape[0]
    if HEAD in made or base.tied:
        for place in (nested, config):
            if place is nested or "tie_word_embeddings" in place:
                place["tie_word_embeddings"] = HEAD not in made
    for place in (nested, config):
        for key in ("dtype", "torch_dtype"):
            if key in place:
                place[key] = _main_dtype(made)
    return config


def _main_dtype(made: Mapping[str, Recipe]) -> str:
    elements: Counter[str] = Counter()
    for recipe in made.values():
        elements[recipe.dtype] += prod(recipe.shape)
    return NAMES[elements.most_common(1)[0][0]]


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
