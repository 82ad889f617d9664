"""What llama.cpp must know of a model, read from `config.json`: the architecture's name, sizes and rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from calpaca.core.errors import CorruptFileError, UnsupportedError
from calpaca.core.gguf_model import Llama3Rope

_ARCHITECTURES: Mapping[str, Literal["llama", "qwen2"]] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
}
_THETA = 10_000.0
_SCALINGS = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding: `kind` is `default`, `linear`, `yarn` or `llama3`; `stated` has its numbers."""

    theta: float
    kind: str
    stated: Mapping[str, Any]


@dataclass(frozen=True)
class GgufArchitecture:
    """`name` is llama.cpp's. Lengths are in tokens; `config` is the model's own."""

    name: Literal["llama", "qwen2"]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    tied: bool
    rope: Rope
    notes: tuple[str, ...] = ()

    def rotary_head_dim(self, name: str) -> int | None:
        """Rows of a head in a tensor at Hugging Face whose rows llama.cpp has in the original order; else None.

        Qwen 2 keeps them as they are.
        """
        rotary = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
        return self.head_dim if self.name == "llama" and rotary else None

    def rope_factors(self) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """What each frequency is divided by in Llama 3.1 and later, float32 [head_dim / 2]; None for other models."""
        if self.rope.kind != "llama3":
            return None
        factor, low, high, original = (
            float(self.rope.stated[key])
            for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        factors = Llama3Rope(factor, low, high, original).factors(self.rope.theta, self.head_dim // 2)
        return factors.astype(np.float32)


def read_architecture(config: Mapping[str, Any], name: str, *, tied: bool) -> GgufArchitecture:
    """The architecture of a model called `name`. Raises UnsupportedError for what a GGUF file cannot say."""
    kind = (config.get("architectures") or [_by_type(config)])[0]
    if kind not in _ARCHITECTURES:
        raise UnsupportedError(
            f"{name} is a {kind}, which cannot be exported to GGUF.",
            f"Supported are {', '.join(_ARCHITECTURES)}; use llama.cpp's own converter for others.",
        )
    _check_expressible(config, name)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return GgufArchitecture(
            name=_ARCHITECTURES[kind],
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            context_length=int(config["max_position_embeddings"]),
            norm_eps=float(config["rms_norm_eps"]),
            tied=tied,
            rope=_rope(config, name),
            notes=_notes(config),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"The config.json of {name} lacks or garbles {error}.", "Fetch it from where the weights came."
        ) from error


def _by_type(config: Mapping[str, Any]) -> str:
    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    kind = str(config.get("model_type", "model of unknown type"))
    return names.get(kind, kind)


def _check_expressible(config: Mapping[str, Any], name: str) -> None:
    if config.get("quantization_config"):
        raise UnsupportedError(f"{name} is quantized already.", "Export the weights it was quantized from.")
    if config.get("hidden_act", "silu") not in {"silu", "swish"}:
        raise UnsupportedError(
            f"{name} computes {config['hidden_act']} where llama.cpp has silu.", "It cannot be exported to GGUF."
        )


def _rope(config: Mapping[str, Any], name: str) -> Rope:
    """From the keys of transformers 5 or of older versions."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(stated.get("rope_theta") or config.get("rope_theta") or _THETA)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    partial = float(stated.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if kind not in _SCALINGS or partial != 1.0:
        what = f"rotary scaling '{kind}'" if kind not in _SCALINGS else f"a partial rotary embedding of {partial:g}"
        raise UnsupportedError(
            f"{name} has {what}, which a GGUF file of its architecture cannot express.",
            f"Supported are {', '.join(_SCALINGS)}.",
        )
    return Rope(theta, kind, stated)


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    window, length = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    if not window or window >= length or not config.get("use_sliding_window", True):
        return ()
    return (
        f"The model looks back at most {window} tokens; llama.cpp looks back at all of them, so longer texts differ.",
    )
