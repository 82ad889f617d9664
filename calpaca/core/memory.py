"""How much memory a model needs, from its shapes: weights in each number format, and the keys and values of a context.

What libraries and a forward pass take comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "token_embd.weight")
"""Ends of the names that input embeddings have, in Hugging Face folders and GGUF files."""

_HEADS = {"lm_head.weight", "output.weight"}
_BLOCK = 64  # elements that share one scale in bitsandbytes' 4-bit format
_CACHE_BYTES = {"float32": 4, "bfloat16 or float16": 2, "8bit": 2, "4bit": 2}


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes for one dtype or quantization; `cache` is for one sequence that fills the context, None if not known."""

    dtype: str
    weights: int
    cache: int | None


def memory_needs(shapes: Shapes, config: Mapping[str, Any]) -> tuple[MemoryNeed, ...]:
    """What a model takes in each form that calpaca loads it in. `config` has the keys of `config.json`.

    8 and 4 bits are bitsandbytes': matrices but for embeddings and output layer, each with its scales.
    """
    tied = config.get("tie_word_embeddings") and any(name.endswith(EMBEDDINGS) for name in shapes)
    stored = [(name, shape) for name, shape in shapes.items() if not (tied and name in _HEADS)]
    total = sum(prod(shape) for _, shape in stored)
    matrices = [
        shape for name, shape in stored if len(shape) == 2 and name not in _HEADS and not name.endswith(EMBEDDINGS)
    ]
    packed = sum(map(prod, matrices))
    scales = sum(rows for rows, _ in matrices)
    weights = {
        "float32": 4 * total,
        "bfloat16 or float16": 2 * total,
        "8bit": 2 * (total - packed) + packed + 4 * scales,
        "4bit": 2 * (total - packed) + packed // 2 + 4 * (packed // _BLOCK),
    }
    values = values_per_token(config)
    length = config.get("max_position_embeddings")
    return tuple(
        MemoryNeed(dtype, size, None if values is None or length is None else values * length * _CACHE_BYTES[dtype])
        for dtype, size in weights.items()
    )


def values_per_token(config: Mapping[str, Any]) -> int | None:
    """Numbers that are kept for each token of a context: a key and a value for each layer and key-value head."""
    if any("bert" in name.lower() for name in config.get("architectures") or ()):
        return None  # it reads a text at once and keeps nothing
    try:
        heads = int(config["num_attention_heads"])
        head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return 2 * int(config["num_hidden_layers"]) * kv_heads * head_size
    except (KeyError, TypeError, ZeroDivisionError):
        return None
