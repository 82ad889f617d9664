"""Tensor names of the original LLaMA checkpoints and of Hugging Face, and how parts divide each tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Rotary = Literal["heads", "kv_heads"]


@dataclass(frozen=True)
class Layout:
    """`axis` is the dimension along which parts divide a tensor, None where each part has all of it. Rows of a
    `rotary` tensor stand in another order in each form, and `rotary` says how many heads it has. Where there are more
    parts than key-value heads, a `repeated` tensor has each head in several parts."""

    axis: Literal[0, 1] | None
    rotary: Rotary | None = None
    repeated: bool = False


EMBEDDINGS, OUTPUT, NORM = "tok_embeddings.weight", "output.weight", "norm.weight"
HF_EMBEDDINGS, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_ENDS = {EMBEDDINGS: HF_EMBEDDINGS, NORM: "model.norm.weight", OUTPUT: HF_OUTPUT}
_IN_LAYER = {
    "attention.wq": ("self_attn.q_proj", Layout(0, "heads")),
    "attention.wk": ("self_attn.k_proj", Layout(0, "kv_heads", repeated=True)),
    "attention.wv": ("self_attn.v_proj", Layout(0, repeated=True)),
    "attention.wo": ("self_attn.o_proj", Layout(1)),
    "feed_forward.w1": ("mlp.gate_proj", Layout(0)),
    "feed_forward.w2": ("mlp.down_proj", Layout(1)),
    "feed_forward.w3": ("mlp.up_proj", Layout(0)),
    "attention_norm": ("input_layernorm", Layout(None)),
    "ffn_norm": ("post_attention_layernorm", Layout(None)),
}
_FROM_HF = {hf: original for original, (hf, _) in _IN_LAYER.items()}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_BUFFER = re.compile(r"rope\.freqs|(.*\.)?rotary_emb\.inv_freq")


def is_buffer(name: str) -> bool:
    """Whether a tensor holds rotary frequencies, which follow from the configuration and are left out."""
    return _BUFFER.fullmatch(name) is not None


def to_hf(name: str) -> str | None:
    """The name at Hugging Face of an original one, None for a tensor that LLaMA does not have."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return _ENDS.get(name)
    entry = _IN_LAYER.get(match[2])
    return f"model.layers.{match[1]}.{entry[0]}.weight" if entry else None


def to_original(name: str) -> str | None:
    """The original name of one at Hugging Face, None for a tensor that LLaMA does not have."""
    match = _HF_LAYER.fullmatch(name)
    if match is None:
        return next((original for original, hf in _ENDS.items() if hf == name), None)
    stem = _FROM_HF.get(match[2])
    return f"layers.{match[1]}.{stem}.weight" if stem else None


def layout(name: str, embedding_axis: Literal[0, 1]) -> Layout:
    """How parts divide the tensor of this original name."""
    match = _LAYER.fullmatch(name)
    if match is not None:
        return _IN_LAYER[match[2]][1]
    return {EMBEDDINGS: Layout(embedding_axis), OUTPUT: Layout(0), NORM: Layout(None)}[name]


def layer_of(name: str) -> int | None:
    """The number of the layer that an original name is in."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def names(layers: int) -> list[str]:
    """Every tensor of a model with so many layers, by original name, in the order of the original files."""
    return [*_ENDS, *(f"layers.{number}.{stem}.weight" for number in range(layers) for stem in _IN_LAYER)]


def hf_names(layers: int) -> list[str]:
    """Every tensor at Hugging Face, in the order in which a model computes."""
    inside = [f"model.layers.{number}.{hf}.weight" for number in range(layers) for hf, _ in _IN_LAYER.values()]
    return [HF_EMBEDDINGS, *inside, "model.norm.weight", HF_OUTPUT]
