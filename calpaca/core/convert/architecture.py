"""What a LLaMA model is, read from `params.json` or `config.json` and its tensors, and written as either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from calpaca.core.convert.names import EMBEDDINGS, NORM, OUTPUT, layer_of, names
from calpaca.core.errors import CorruptFileError, UnsupportedError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of whole tensors, by original name."""

LLAMA3_THETA = 500_000.0
_THETA = 10_000.0
_LONGEST = {"llama3": 131_072, "3": 8192, "code": 16_384, "2": 4096, "1": 2048}  # tokens, by generation
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_PUBLISHED = ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3))
"""`multiple_of` and `ffn_dim_multiplier` of Meta's models."""
_KEEP_HF = "Keep it as a Hugging Face folder, or export it to GGUF: calpaca models export"


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch the rotary embedding; the numbers are named as in `config.json`."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Sizes and numbers of a LLaMA model. `vocabulary` counts embedding rows; lengths are in tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    norm_eps: float
    rope_theta: float = _THETA
    rope_scaling: RopeScaling | None = None
    context_length: int = _LONGEST["1"]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def is_llama3(self) -> bool:
        return self.rope_scaling is not None or self.rope_theta == LLAMA3_THETA

    @property
    def embedding_axis(self) -> Literal[0, 1]:
        """The dimension along which parts divide the embeddings: Meta changed it with Llama 3."""
        return 0 if self.is_llama3 else 1

    def heads_of(self, rotary: str) -> int:
        return self.heads if rotary == "heads" else self.kv_heads

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the tensor of this original name must have."""
        if name in {EMBEDDINGS, OUTPUT}:
            return (self.vocabulary, self.hidden)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        narrow = self.kv_heads * self.head_dim
        return {
            "wq": (self.hidden, self.hidden),
            "wk": (narrow, self.hidden),
            "wv": (narrow, self.hidden),
            "wo": (self.hidden, self.hidden),
            "w1": (self.intermediate, self.hidden),
            "w2": (self.hidden, self.intermediate),
            "w3": (self.intermediate, self.hidden),
        }.get(kind, (self.hidden,))


# ---- from what lies on disk ---------------------------------------------------------------------------------------


def from_params(params: Mapping[str, Any], shapes: Shapes, where: str) -> Architecture:
    """The architecture of an original checkpoint. Sizes are the tensors'; `params.json` says what they do not.

    Raises CorruptFileError when both contradict each other, with the numbers.
    """
    told = params.get("model", params)
    try:
        heads = int(told["n_heads"])
        norm_eps = float(told["norm_eps"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{where}/params.json lacks {error}; the tensors do not tell it.", "Take the original params.json."
        ) from error
    hidden = shapes[NORM][0]
    kv_heads = _kv_heads(told, shapes, hidden, heads, where)
    theta = float(told.get("rope_theta") or _THETA)
    scaling = _scaling_of_params(told, hidden)
    architecture = Architecture(
        hidden=hidden,
        intermediate=shapes["layers.0.feed_forward.w1.weight"][0],
        layers=1 + max(number for name in shapes if (number := layer_of(name)) is not None),
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=shapes[EMBEDDINGS][0],
        norm_eps=norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        context_length=_context_length(theta, scaling, norm_eps, kv_heads < heads),
    )
    _check_told(told, architecture, where)
    return architecture


def _kv_heads(told: Mapping[str, Any], shapes: Shapes, hidden: int, heads: int, where: str) -> int:
    if heads < 1 or hidden % heads:
        raise CorruptFileError(
            f"{where}/params.json says n_heads {heads}, which does not divide the tensors' width {hidden}.",
            "Take the params.json that belongs to the parts.",
        )
    stated = told.get("n_kv_heads")
    return int(stated) if stated else shapes["layers.0.attention.wk.weight"][0] // (hidden // heads)


def _check_told(told: Mapping[str, Any], found: Architecture, where: str) -> None:
    """`params.json` may leave sizes out (vocab_size is -1 in LLaMA and Llama 2), but must not state wrong ones."""
    pairs = {"dim": found.hidden, "n_layers": found.layers, "vocab_size": found.vocabulary}
    for key, value in pairs.items():
        stated = told.get(key)
        if stated is not None and int(stated) > 0 and int(stated) != value:
            raise CorruptFileError(
                f"{where}/params.json says {key} {stated}, but the tensors have {value}.",
                "Take the params.json that belongs to the parts"
                + (", or set vocab_size to -1 (the tensors decide)." if key == "vocab_size" else "."),
            )


def _scaling_of_params(told: Mapping[str, Any], hidden: int) -> RopeScaling | None:
    if not told.get("use_scaled_rope"):
        return None
    factor = float(told.get("rope_scaling_factor") or _published_factor(hidden))
    return RopeScaling(factor, high_freq_factor=float(told.get("rope_high_freq_factor") or 4.0))


def _published_factor(hidden: int) -> float:
    """Meta's files leave the factor to the code: 32 for the small models of Llama 3.2, 8 for all others."""
    return 32.0 if hidden < 4096 else 8.0


def _context_length(theta: float, scaling: RopeScaling | None, norm_eps: float, grouped: bool) -> int:
    """What the generations were trained for; the files do not say. LLaMA's smaller models are told by norm_eps."""
    if scaling is not None:
        return _LONGEST["llama3"]
    if theta == LLAMA3_THETA:
        return _LONGEST["3"]
    if theta > _THETA:
        return _LONGEST["code"]
    return _LONGEST["2"] if grouped or norm_eps > 2e-6 else _LONGEST["1"]


def from_config(config: Mapping[str, Any], shapes: Shapes, where: str) -> Architecture:
    """The architecture of a Hugging Face model. Raises UnsupportedError for one that `.pth` cannot express."""
    _check_expressible(config, where)
    hidden = shapes[NORM][0]
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    if head_dim * heads != hidden:
        raise UnsupportedError(
            f"{where} has {heads} heads of {head_dim}, but is {hidden} wide; a .pth checkpoint cannot say that.",
            _KEEP_HF,
        )
    theta, scaling = _rope_of_config(config, where)
    return Architecture(
        hidden=hidden,
        intermediate=shapes["layers.0.feed_forward.w1.weight"][0],
        layers=1 + max(number for name in shapes if (number := layer_of(name)) is not None),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        vocabulary=shapes[EMBEDDINGS][0],
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        context_length=int(config.get("max_position_embeddings") or _LONGEST["1"]),
    )


def _check_expressible(config: Mapping[str, Any], where: str) -> None:
    kind = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    if kind not in _ARCHITECTURES and config.get("model_type") not in {"llama", "mistral"}:
        raise UnsupportedError(f"{where} is a {kind}; only LLaMA's architecture has a .pth form.", _KEEP_HF)
    if config.get("quantization_config"):
        raise UnsupportedError(f"{where} is quantized; a .pth checkpoint holds plain numbers.", _KEEP_HF)
    if config.get("hidden_act", "silu") not in {"silu", "swish"}:
        raise UnsupportedError(f"{where} computes {config['hidden_act']} where LLaMA has silu.", _KEEP_HF)


def _rope_of_config(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from the keys of transformers 5 or of older versions."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(stated.get("rope_theta") or config.get("rope_theta") or _THETA)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    partial = float(stated.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if kind == "default" and partial == 1.0:
        return theta, None
    if kind != "llama3" or partial != 1.0:
        raise UnsupportedError(f"{where} has rotary scaling '{kind}', which params.json cannot express.", _KEEP_HF)
    scaling = RopeScaling(
        factor=float(stated["factor"]),
        low_freq_factor=float(stated["low_freq_factor"]),
        high_freq_factor=float(stated["high_freq_factor"]),
        original_max_position_embeddings=int(stated["original_max_position_embeddings"]),
    )
    if (scaling.low_freq_factor, scaling.original_max_position_embeddings) != (1.0, 8192):
        raise UnsupportedError(
            f"{where} has a rotary scaling of its own, {stated}, which params.json cannot express.", _KEEP_HF
        )
    return theta, scaling


def check_shapes(found: Architecture, shapes: Shapes, where: str) -> None:
    """Raise CorruptFileError unless exactly the tensors of the architecture are there, each in its shape."""
    missing = [name for name in names(found.layers) if name not in shapes]
    if missing:
        raise CorruptFileError(
            f"{where} lacks {len(missing)} tensors of a model with {found.layers} layers, for example {missing[0]}.",
            "Fetch the missing files.",
        )
    for name in names(found.layers):
        if shapes[name] != found.shape(name):
            raise CorruptFileError(
                f"{where}: {name} is {_times(shapes[name])}, but must be {_times(found.shape(name))} for a model that is"
                f" {found.hidden} wide with {found.heads} heads and {found.kv_heads} key-value heads.",
                "Take the configuration that belongs to the weights.",
            )


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# ---- to what is written -------------------------------------------------------------------------------------------


def to_params(architecture: Architecture) -> dict[str, Any]:
    """`params.json`, with the keys that Meta's own code takes and no others."""
    multiple_of, multiplier = _feed_forward(architecture.hidden, architecture.intermediate)
    params: dict[str, Any] = {
        "dim": architecture.hidden,
        "n_layers": architecture.layers,
        "n_heads": architecture.heads,
        "n_kv_heads": architecture.kv_heads if architecture.kv_heads != architecture.heads else None,
        "vocab_size": architecture.vocabulary,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": architecture.norm_eps,
        "rope_theta": architecture.rope_theta if architecture.rope_theta != _THETA else None,
    }
    scaling = architecture.rope_scaling
    if scaling is not None:
        factor = scaling.factor if scaling.factor != _published_factor(architecture.hidden) else None
        high = scaling.high_freq_factor if scaling.high_freq_factor != 4.0 else None
        params |= {"use_scaled_rope": True, "rope_scaling_factor": factor, "rope_high_freq_factor": high}
    return {key: value for key, value in params.items() if value is not None}


def _feed_forward(hidden: int, intermediate: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` from which Meta's code computes `intermediate`.

    Its rule: two thirds of 4 * dim, times the multiplier, rounded up to a multiple. Meta's own pairs are tried first.
    """
    two_thirds = 8 * hidden // 3
    plain = ((2**power, None) for power in range(7, -1, -1))
    for multiple, multiplier in (*_PUBLISHED, *plain):
        if _feed_forward_size(two_thirds, multiplier, multiple) == intermediate:
            return multiple, multiplier
    multiple = intermediate & -intermediate  # the largest power of two in it
    return multiple, (intermediate - multiple / 2 + 1) / two_thirds


def _feed_forward_size(two_thirds: int, multiplier: float | None, multiple: int) -> int:
    size = int(multiplier * two_thirds) if multiplier is not None else two_thirds
    return -(-size // multiple) * multiple


def to_config(architecture: Architecture, dtype: str, special_ids: Mapping[str, int | list[int]]) -> dict[str, Any]:
    """`config.json` with keys that old and new versions of transformers, vLLM and llama.cpp's converter read.

    `dtype` is torch's name; `special_ids` holds `bos_token_id`, `eos_token_id` and `pad_token_id` where there are any.
    """
    scaling = architecture.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": architecture.hidden,
        "intermediate_size": architecture.intermediate,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": architecture.context_length,
        "rms_norm_eps": architecture.norm_eps,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": {"rope_type": "llama3", **vars(scaling)} if scaling is not None else None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": architecture.vocabulary,
        "torch_dtype": dtype,
        **special_ids,
    }
