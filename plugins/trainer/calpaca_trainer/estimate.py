"""How much memory a run will take, before anything is loaded.

Activations are those that are kept for the backward pass, for each token of the largest batch. A fused layer keeps its
two inputs, the heads and what they saw, gate and up, all in the dtype that is computed in. PyTorch keeps of transformers'
own layer what each linear layer reads, the heads before and after rotation, the gate, and in float32 what each norm and
each adapter reads. Attention's own are those of a fused kernel, which keeps no matrix of all pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from calpaca.core.disk import megabytes
from calpaca.core.memory import Shapes, values_per_token
from calpaca_trainer.recipe import Recipe

_LIBRARIES = 600_000_000  # torch, transformers and their threads, bytes
_HOLES = 1.5  # batches of different lengths leave holes in memory: 1.65 GB where 1.42 GB were counted
_HEAD_ROWS = 128  # hidden states whose logits exist at a time
_OPTIMISER = 12  # bytes for each trained number beside its value: gradient, and two averages of AdamW


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. `activations` are of the largest batch without checkpointing, `checkpointed` with it."""

    weights: int
    trained: int
    optimiser: int
    activations: int
    checkpointed: int
    head: int

    def total(self, *, checkpointing: bool) -> int:
        """All of it, with the libraries."""
        kept = self.checkpointed if checkpointing else self.activations
        return _LIBRARIES + self.weights + self.trained + self.optimiser + kept + self.head

    def rows(self, *, checkpointing: bool) -> list[tuple[str, str]]:
        """What is shown to a person."""
        kept = self.checkpointed if checkpointing else self.activations
        parts = {
            "libraries": _LIBRARIES, "frozen weights": self.weights, "trained weights": self.trained,
            "gradients and optimiser": self.optimiser, "activations": kept, "output layer": self.head,
        }  # fmt: skip
        parts["together"] = sum(parts.values())
        return [(name, megabytes(size)) for name, size in parts.items()]


def estimate_memory(
    recipe: Recipe, shapes: Shapes, config: Mapping[str, Any], *, width: int, tokens: int
) -> MemoryEstimate:
    """Estimate from the base's shapes and `config.json`. `width` is the bytes of a number that is computed with, and
    `tokens` are those of the largest batch."""
    weights, trained = _weights(recipe, shapes, width)
    layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
    layer = (_fused_bytes if _is_fused(recipe, config) else _layer_bytes)(recipe, config, width)
    return MemoryEstimate(
        weights=weights,
        trained=4 * trained,
        optimiser=_OPTIMISER * trained,
        activations=int(_HOLES * tokens * (layers * layer + 3 * hidden * width)),
        checkpointed=int(_HOLES * tokens * (layers * hidden * width + layer)),
        head=(4 * 2 + 2 * width) * min(_HEAD_ROWS, tokens) * int(config["vocab_size"]),
    )


def _weights(recipe: Recipe, shapes: Shapes, width: int) -> tuple[int, int]:
    """Bytes of the frozen weights, and how many numbers are trained."""
    if recipe.method == "full":
        chosen = {n: s for n, s in shapes.items() if not recipe.trainable or any(t in n for t in recipe.trainable)}
        trained = sum(map(prod, chosen.values()))
        return 4 * (sum(map(prod, shapes.values())) - trained), trained
    per_number = {"8bit": 1.0, "4bit": 0.5}.get(recipe.quantization or "", float(width))
    trained = sum(prod(shape) for name, shape in shapes.items() if _is_saved(recipe, name))
    rank = recipe.rank * (2 if recipe.pissa else 1)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        vocabulary = module.endswith(("embed_tokens", "lm_head"))
        if len(shape) == 2 and (module.rpartition(".")[2] in recipe.targets if recipe.targets else not vocabulary):
            trained += rank * sum(shape) + (shape[0] if recipe.dora else 0)
    return int(per_number * sum(map(prod, shapes.values()))), trained


def _is_saved(recipe: Recipe, name: str) -> bool:
    return any(name.removesuffix(".weight").endswith(module) for module in recipe.save_modules)


@dataclass(frozen=True)
class _Sizes:
    """Numbers that a layer has for each token: of its hidden state, its feed-forward part, all queries, and all keys."""

    hidden: int
    middle: int
    queries: int
    keys: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Sizes:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        keys = (values_per_token(config) or 0) // (2 * int(config["num_hidden_layers"]))
        queries = heads * int(config.get("head_dim") or hidden // heads)
        return cls(hidden, int(config["intermediate_size"]), queries, keys)


def _is_fused(recipe: Recipe, config: Mapping[str, Any]) -> bool:
    """Whether the layers will be fused, as far as that can be told before they are loaded."""
    plain = recipe.method == "lora" and not (recipe.dora or recipe.dropout or recipe.quantization)
    return plain and not (recipe.fsdp or recipe.deepspeed) and config.get("model_type") == "llama"


def _fused_bytes(recipe: Recipe, config: Mapping[str, Any], width: int) -> int:
    """Bytes that a fused layer keeps for each token."""
    sizes = _Sizes.of(config)
    kept = 2 * sizes.hidden + 2 * sizes.queries + 2 * sizes.keys + 2 * sizes.middle + 7 * recipe.rank
    return width * kept


def _layer_bytes(recipe: Recipe, config: Mapping[str, Any], width: int) -> int:
    """Bytes that PyTorch keeps of transformers' layer for each token."""
    sizes = _Sizes.of(config)
    norms = 2 * (sizes.hidden * 4 * 2 + sizes.hidden * width)  # the input, its float32 copy, what linear layers read
    # Queries and keys before and after rotation, the result, the sum.
    attention = width * (3 * sizes.queries + 4 * sizes.keys + sizes.hidden)
    gate = width * 4 * sizes.middle
    # An adapter keeps a float32 copy of what it reads, and what lies between its factors.
    read = 2 * sizes.hidden + sizes.queries + sizes.middle
    adapter = 4 * read + 4 * 7 * recipe.rank if recipe.method == "lora" and width < 4 else 0
    return norms + attention + gate + adapter
