"""How much memory a run will take, before anything is loaded.

Activations are those that PyTorch keeps for the backward pass of a LLaMA layer, counted from its code in transformers
5: for each token, in the dtype that is computed in, what each linear layer reads, the heads, and the gate; in float32,
what each norm keeps. Attention's own are those of a fused kernel, which keeps no matrix of all pairs.
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
_HOLES = 1.25  # batches of different lengths leave holes in memory: 3.8 GB where 3.2 GB were in use
_HEAD_ROWS = 256  # hidden states whose logits exist at a time
_OPTIMISER = 12  # bytes for each trained number beside its value: gradient, and two averages of AdamW


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. `activations` are of one batch at full length without checkpointing, `checkpointed` with it."""

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


def estimate_memory(recipe: Recipe, shapes: Shapes, config: Mapping[str, Any], width: int) -> MemoryEstimate:
    """Estimate from the base's shapes and `config.json`. `width` is the bytes of a number that is computed with."""
    weights, trained = _weights(recipe, shapes, width)
    tokens = recipe.batch_size * recipe.max_length
    layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
    layer = _layer_bytes(recipe, config, width)
    return MemoryEstimate(
        weights=weights,
        trained=4 * trained,
        optimiser=_OPTIMISER * trained,
        activations=int(_HOLES * tokens * (layers * layer + 3 * hidden * width)),
        checkpointed=int(_HOLES * tokens * (layers * hidden * width + layer)),
        head=(4 + 2 * width) * _HEAD_ROWS * int(config["vocab_size"]),
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


def _layer_bytes(recipe: Recipe, config: Mapping[str, Any], width: int) -> int:
    """Bytes that one layer keeps for each token."""
    hidden, middle = int(config["hidden_size"]), int(config["intermediate_size"])
    keys = (values_per_token(config) or 0) // (2 * int(config["num_hidden_layers"]))
    heads = int(config["num_attention_heads"]) * int(config.get("head_dim") or hidden // config["num_attention_heads"])
    norms = 2 * (hidden * 4 * 2 + hidden * width)  # the input and its float32 copy, and what the linear layers read
    attention = width * (2 * heads + 4 * keys + heads + hidden)  # before and after rotation, the result, the sum
    gate = width * 4 * middle
    # An adapter keeps a float32 copy of what it reads, and what lies between its factors.
    adapter = 4 * (2 * hidden + heads + middle) + 4 * 7 * recipe.rank if recipe.method == "lora" and width < 4 else 0
    return norms + attention + gate + adapter
